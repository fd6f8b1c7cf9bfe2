"""Rotary frequencies, and how each context extension scales them: PI (in the position), NTK, NTK-mixed, YaRN."""

import math

import torch
from torch import Tensor

from model.positions.config import PositionConfig

YARN_MAX_ROTATIONS = 32.0
"""Channels that rotate more often than this within the trained length keep their frequency (DeepSeek's beta_fast)."""


def frequencies(position: PositionConfig, size: int, trained_length: int) -> Tensor:
    """Radians per position of each pair of the `size` rotated channels, float64 [size / 2].

    ntk is bloc97's rule, base * s^(d/(d-2)), which interpolates the lowest frequency exactly. ntk-mixed is
    theta_i * exp(-a (i+1)^c) with a (d/2)^c = log s (Su 2023, kexue.fm/archives/9706); c = 1 is the post's NTK-fixed, c = 0
    is PI. yarn is Peng et al. 2023 (arXiv 2309.00071).
    """
    index = torch.arange(size // 2, dtype=torch.float64)
    unscaled = position.rope_theta ** (-2 * index / size)
    match position.kind:
        case "rope" | "none" | "pi" | "rerope" | "leaky-rerope":
            return unscaled
        case "ntk":
            base = position.rope_theta * position.factor ** (size / max(size - 2, 1))
            return base ** (-2 * index / size)
        case "ntk-mixed":
            c = position.mixed_exponent
            return unscaled * torch.exp(-math.log(position.factor) * ((index + 1) / (size / 2)) ** c)
        case "yarn":
            kept = _yarn_kept(position, unscaled, size, trained_length)
            return (kept + (1 - kept) / position.factor) * unscaled
        case _:
            raise ValueError(f"position.kind = '{position.kind}' is unknown")


def _yarn_kept(position: PositionConfig, unscaled: Tensor, size: int, trained_length: int) -> Tensor:
    """Share of each frequency that is not interpolated: 1 for high ones, 0 below one rotation within the trained length."""
    if position.yarn_ramp == "turns":
        rotations = unscaled * trained_length / (2 * math.pi)
        return ((rotations - 1) / (YARN_MAX_ROTATIONS - 1)).clamp(0, 1)

    def index_of(rotations: float) -> float:
        return size * math.log(trained_length / (rotations * 2 * math.pi)) / (2 * math.log(position.rope_theta))

    low = max(math.floor(index_of(YARN_MAX_ROTATIONS)), 0)
    high = min(math.ceil(index_of(1.0)), size - 1)
    ramp = (torch.arange(size // 2, dtype=torch.float64) - low) / max(high - low, 0.001)
    return 1 - ramp.clamp(0, 1)
