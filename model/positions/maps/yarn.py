"""YaRN: low frequencies are interpolated, high ones kept, logits scaled (Peng et al. 2023, arXiv 2309.00071)."""

import math
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from model.positions.maps.scaled import ScaledKeys, ScaledMap

YARN_MAX_ROTATIONS = 32.0
"""Channels that rotate more often than this within the trained length keep their frequency (DeepSeek's beta_fast)."""


class YarnKeys(ScaledKeys):
    """Keys of YaRN."""

    yarn_ramp: Literal["rotations", "index"] = Field(
        default="rotations",
        description="yarn: ramp linear in the rotations (the paper) or in the index (code in circulation, DeepSeek).",
    )


class Yarn(ScaledMap[YarnKeys]):
    """Frequencies between theta_i and theta_i / factor, and logits times (1 + 0.1 log factor)^2."""

    keys = YarnKeys
    stock = "yarn_ramp = 'index', attention = 'gqa'"

    def frequencies(self, size: int, trained_length: int) -> Tensor:
        """Divided by the factor as far as they are not kept."""
        unscaled = super().frequencies(size, trained_length)
        kept = self._kept(unscaled, size, trained_length)
        return (kept + (1 - kept) / self.position.factor) * unscaled

    def query_scale(self) -> float:
        """(1 + 0.1 log factor)^2: the paper's temperature, on queries and keys, put on the queries alone."""
        return (1 + 0.1 * math.log(self.position.factor)) ** 2

    def rope_parameters(self, attention: str, rotary_size: int, trained_length: int) -> dict[str, Any] | None:
        """With the ramp in the index, and where no other scale of the logits is in the way, as in latent attention."""
        if self.position.yarn_ramp != "index" or attention != "gqa":
            return None
        return {
            "rope_type": "yarn", "rope_theta": self.position.rope_theta, "factor": self.position.factor, "beta_fast": 32.0,
            "beta_slow": 1.0, "original_max_position_embeddings": trained_length,
        }  # fmt: skip

    def _kept(self, unscaled: Tensor, size: int, trained_length: int) -> Tensor:
        """Share of each frequency that is not interpolated: 1 for high ones, 0 below one rotation in the trained length."""
        if self.position.yarn_ramp == "rotations":
            rotations = unscaled * trained_length / (2 * math.pi)
            return ((rotations - 1) / (YARN_MAX_ROTATIONS - 1)).clamp(0, 1)

        def index_of(rotations: float) -> float:
            return size * math.log(trained_length / (rotations * 2 * math.pi)) / (2 * math.log(self.position.rope_theta))

        low = max(math.floor(index_of(YARN_MAX_ROTATIONS)), 0)
        high = min(math.ceil(index_of(1.0)), size - 1)
        ramp = (torch.arange(size // 2, dtype=torch.float64) - low) / max(high - low, 0.001)
        return 1 - ramp.clamp(0, 1)
