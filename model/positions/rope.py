"""Rotary caches: cosines and sines of every position, and their application to queries and keys (Su et al. 2021, RoFormer).

R(m) rotates by m positions, so that R(i) q_i and R(j) k_j meet rotated by i - j. A map with a window w (ReRoPE, Leaky and
inverse Leaky ReRoPE; Su 2023, kexue.fm/archives/9708 and 9728) is linear on each side of it, with slope s beyond it, and so
two pairs of caches give what PositionMap.relative_position defines:

    near, r < w     R(i) q_i                R(j) k_j
    far, r >= w     R(w + s (i - w)) q_i    R(s j) k_j        s = 0 for ReRoPE, whose far keys stay unrotated

Angles are built in float64 and kept as cosines and sines: a float32 angle is off by 1e-3 at positions that inverse
Leaky ReRoPE reaches, a bf16 one has 897 different values below 8192.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from model.positions.config import PositionConfig

Region = Literal["near", "far-query", "far-key"]


@dataclass(frozen=True)
class RotaryCache:
    """Rotation at each of S positions: cosines and sines [S, size / 2], float32 (float64 for a float64 network), times the
    map's factor on what is rotated."""

    cos: Tensor
    sin: Tensor

    def narrow(self, start: int, length: int) -> "RotaryCache":
        """Rows [start, start + length), views."""
        return RotaryCache(self.cos.narrow(0, start, length), self.sin.narrow(0, start, length))

    def select(self, ranges: Sequence[tuple[int, int]]) -> "RotaryCache":
        """Rows [start, end) of each range, one after the other."""
        return RotaryCache(*(torch.cat([x[start:end] for start, end in ranges]) for x in (self.cos, self.sin)))


def apply_rotary(x: Tensor, rotary: RotaryCache | None, scale: Tensor | None = None, interleaved: bool = False) -> Tensor:
    """Rotate the channels of x [B, S, heads, size] in pairs, and scale; in float32 or better, back in the dtype of x.

    Pairs are (c, c + size/2) as in Llama, or with `interleaved` (2c, 2c + 1) as in DeepSeek-V3; the result always has
    the first members first, which changes no score. `scale` is broadcast against [B, S].
    """
    if rotary is None and scale is None:
        return x
    wide = x
    if rotary is not None:
        a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
        cos, sin = rotary.cos[:, None, :], rotary.sin[:, None, :]
        wide = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    if scale is not None:
        wide = wide * scale[..., None, None]
    return wide.to(x.dtype)


@lru_cache(maxsize=32)
def rotary_cache(
    position: PositionConfig, size: int, trained_length: int, length: int, region: Region, device: str, double: bool
) -> RotaryCache:
    """The cache of positions 0 to length - 1 for `size` rotated channels, in float64 if `double`."""
    index, far = torch.arange(length, dtype=torch.float64), position.map.far_region()
    match region:
        case "near":
            rotation = position.map.near_rotation(index)
        case "far-query" if far is not None:
            rotation = far.window + far.slope * (index - far.window)
        case "far-key" if far is not None:
            rotation = far.slope * index
        case _:
            raise AssertionError(region)
    with torch.inference_mode(False):  # a cache made while decoding serves training later
        angle = torch.outer(rotation, position.map.frequencies(size, trained_length))
        dtype, factor = torch.float64 if double else torch.float32, position.map.rotated_factor()
        return RotaryCache((angle.cos() * factor).to(device, dtype), (angle.sin() * factor).to(device, dtype))
