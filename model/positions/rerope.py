"""Relative positions: from the distance r = i - j of a query i and a key j to the rotation between them, for every map.

`relative_position` is the single source of truth: rotary caches (model/positions/rope.py) reproduce it, tests compare with it.
"""

import math

import torch
from torch import Tensor

from model.positions.config import PositionConfig


def relative_position(position: PositionConfig, distance: Tensor) -> Tensor:
    """Rotation, in positions, between a query and a key `distance` >= 0 tokens before it; float64, any shape."""
    r = distance.double()
    match position.kind:
        case "rope" | "ntk" | "ntk-mixed" | "yarn":
            return r
        case "none":
            return torch.zeros_like(r)
        case "pi":
            return r / position.factor
        case "rerope" | "leaky-rerope":
            w = window_size(position)
            return torch.where(r < w, r, w + far_slope(position) * (r - w))
        case _:
            raise ValueError(f"position.kind = '{position.kind}' is unknown")


def has_two_regions(position: PositionConfig) -> bool:
    """Whether distances from the window on are rotated by another rule than those below it."""
    return position.kind in ("rerope", "leaky-rerope")


def window_size(position: PositionConfig) -> int:
    """Tokens of the near region: distances below it are exact. Of maps with two regions only."""
    assert position.window is not None
    return position.window


def far_slope(position: PositionConfig) -> float:
    """Positions that one more token beyond the window adds: 0 for ReRoPE, 1/k for Leaky (above 1 for the inverse)."""
    return 0.0 if position.kind == "rerope" else 1.0 / (position.leak or 1.0)


def usable_length(evaluated: PositionConfig, trained: PositionConfig, trained_length: int) -> int | None:
    """Tokens over which every rotation of `evaluated` was met in training with `trained`; None = no limit.

    The limit on k of Leaky ReRoPE and its inverse is Su 2023, kexue.fm/archives/9728.
    """
    largest = float(relative_position(trained, torch.tensor(trained_length - 1)))
    match evaluated.kind:
        case "none":
            return None
        case "rope":
            return math.floor(largest) + 1
        case "pi" | "ntk" | "ntk-mixed" | "yarn":
            return math.floor(largest * evaluated.factor) + 1
        case "rerope" | "leaky-rerope":
            w, slope = window_size(evaluated), far_slope(evaluated)
            if w > largest:
                return math.floor(largest) + 1
            return None if slope == 0 else w + math.floor((largest - w) / slope) + 1
        case _:
            raise ValueError(f"position.kind = '{evaluated.kind}' is unknown")
