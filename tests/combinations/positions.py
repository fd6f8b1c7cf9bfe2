"""Position maps by their formulas: from the distance r = i - j of a query i and a key j to a rotation.

Every map is linear in r, or linear on each side of a window, so a rotation by slope * r + offset is that of the query by
slope * i + offset and of the key by slope * j.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """From the distance `first` on, the rotation is slope * r + offset (in positions)."""

    first: int
    slope: float
    offset: float = 0.0


def pieces(position: Any) -> list[Piece]:
    """The map in pieces, each holding up to the first distance of the next."""
    w = position.window
    match position.kind:
        case "none":
            return [Piece(0, 0.0)]
        case "rope" | "ntk" | "ntk-mixed" | "yarn" | "llama3":
            return [Piece(0, 1.0)]
        case "pi":
            return [Piece(0, 1 / position.factor)]
        case "rerope":
            return [Piece(0, 1.0), Piece(w, 0.0, float(w))]
        case "leaky-rerope":
            slope = 1 / position.leak
            return [Piece(0, 1.0), Piece(w, slope, w - slope * w)]
    raise ValueError(position.kind)


def frequencies(position: Any, size: int, trained_length: int) -> Tensor:
    """Radians per position of each of the size / 2 pairs of channels, float64."""
    half, s, base = size // 2, position.factor, position.rope_theta
    theta = torch.tensor([base ** (-2 * i / size) for i in range(half)], dtype=torch.float64)
    match position.kind:
        case "ntk":
            larger = base * s ** (size / max(size - 2, 1))
            return torch.tensor([larger ** (-2 * i / size) for i in range(half)], dtype=torch.float64)
        case "ntk-mixed":
            c = position.mixed_exponent
            a = math.log(s) / half**c
            return theta * torch.tensor([math.exp(-a * (i + 1) ** c) for i in range(half)], dtype=torch.float64)
        case "yarn":
            kept = torch.tensor(_yarn_kept(position, theta.tolist(), size, trained_length), dtype=torch.float64)
            return kept * theta + (1 - kept) * theta / s
        case "llama3":
            return torch.tensor([_llama3(position, t, trained_length) for t in theta.tolist()], dtype=torch.float64)
    return theta


def _llama3(position: Any, theta: float, trained_length: int) -> float:
    """A frequency by its wavelength: long ones are divided, short ones kept, those between interpolated."""
    wavelength, low, high = 2 * math.pi / theta, position.low_freq_factor, position.high_freq_factor
    if wavelength > trained_length / low:
        return theta / position.factor
    if wavelength < trained_length / high:
        return theta
    kept = (trained_length / wavelength - low) / (high - low)
    return (1 - kept) * theta / position.factor + kept * theta


def _yarn_kept(position: Any, theta: list[float], size: int, trained_length: int) -> list[float]:
    """Share of each frequency that is not divided by the factor."""

    def clamp(x: float) -> float:
        return min(1.0, max(0.0, x))

    fast, slow = position.beta_fast, position.beta_slow
    if position.yarn_ramp == "rotations":
        turns = [t * trained_length / (2 * math.pi) for t in theta]
        return [clamp((turn - slow) / (fast - slow)) for turn in turns]

    def index_with(turns: float) -> float:
        """The index i, not whole, whose frequency turns so often: base^(-2i/size) * L / 2 pi = turns."""
        return size / 2 * math.log(trained_length / (2 * math.pi * turns)) / math.log(position.rope_theta)

    down, up = (math.floor, math.ceil) if position.yarn_truncate else (float, float)
    low = max(down(index_with(fast)), 0)
    high = min(up(index_with(slow)), size - 1)
    return [1 - clamp((i - low) / ((high - low) or 0.001)) for i in range(len(theta))]


def log_n(position: Any, place_BS: Tensor, trained_length: int) -> Tensor:
    """What multiplies the query at a place counted from 0 in its document, float64: log n / log L, n the tokens it sees."""
    ratio = (place_BS.double() + 1).log() / math.log(trained_length)
    match position.log_n:
        case "none":
            return torch.ones_like(ratio)
        case "trained":
            return ratio
        case "inference":
            return torch.where(ratio < 1, 1.0, ratio)
    raise ValueError(position.log_n)


def yarn_factor(position: Any) -> float:
    """What multiplies the logits under yarn: (1 + 0.1 log s)^2, or the square of what is given."""
    if position.kind != "yarn":
        return 1.0
    given = position.attention_factor
    return (1 + 0.1 * math.log(position.factor) if given is None else given) ** 2


def turned_factor(position: Any) -> float:
    """What multiplies the part of the logits that comes from turned channels, in addition."""
    return position.rotated_factor**2 if position.kind == "yarn" else 1.0
