"""NTK-aware scaling: the frequencies are lowered, the lowest by the factor exactly."""

import math
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from model.positions.maps.scaled import ScaledKeys, ScaledMap


class NtkMixedKeys(ScaledKeys):
    """Keys of NTK-mixed."""

    mixed_exponent: float = Field(
        default=0.625, ge=0, le=1, description="ntk-mixed: exponent c (Su 2023, kexue.fm/archives/9706); the code used 0.75."
    )


class Ntk(ScaledMap[ScaledKeys]):
    """bloc97's rule, base * s^(d/(d-2)), which interpolates the lowest frequency exactly."""

    def frequencies(self, size: int, trained_length: int) -> Tensor:
        """Of the larger base."""
        index = torch.arange(size // 2, dtype=torch.float64)
        return self._base(size) ** (-2 * index / size)

    def rope_parameters(self, attention: str, rotary_size: int, trained_length: int) -> dict[str, Any]:
        """Plain RoPE of the larger base."""
        return {"rope_type": "default", "rope_theta": self._base(rotary_size)}

    def _base(self, size: int) -> float:
        return self.position.rope_theta * self.position.factor ** (size / max(size - 2, 1))


class NtkMixed(ScaledMap[NtkMixedKeys]):
    """theta_i * exp(-a (i+1)^c) with a (d/2)^c = log s (Su 2023, kexue.fm/archives/9706).

    c = 1 is the post's NTK-fixed, c = 0 is PI.
    """

    keys = NtkMixedKeys
    stock = None

    def frequencies(self, size: int, trained_length: int) -> Tensor:
        """Each lowered by its own factor."""
        index, c = torch.arange(size // 2, dtype=torch.float64), self.position.mixed_exponent
        unscaled = super().frequencies(size, trained_length)
        return unscaled * torch.exp(-math.log(self.position.factor) * ((index + 1) / (size / 2)) ** c)

    def rope_parameters(self, attention: str, rotary_size: int, trained_length: int) -> None:
        """None: no stock architecture has these frequencies."""
