"""Llama 3.1's frequencies: those of long wavelengths are divided by the factor, those of short ones kept.

Grattafiori et al. 2024, The Llama 3 Herd of Models, arXiv 2407.21783; the formula is that of the code beside the weights.
"""

import math
from typing import Any

from pydantic import Field
from torch import Tensor

from model.positions.maps.base import PositionMap
from model.positions.maps.scaled import ScaledKeys


class Llama3Keys(ScaledKeys):
    """Keys of Llama 3.1's frequencies."""

    low_freq_factor: float = Field(
        default=1.0, gt=0, description="llama3: frequencies with fewer rotations in trained_length are divided by factor."
    )
    high_freq_factor: float = Field(
        default=4.0, gt=0, description="llama3: frequencies with more rotations in trained_length are kept."
    )


class Llama3(PositionMap[Llama3Keys]):
    """Between theta_i and theta_i / factor, linear in the rotations within trained_length; logits as they are.

    The factor is part of what the network was trained with, so nothing beyond train.sequence_length comes with it.
    """

    keys = Llama3Keys

    def problem(self) -> str:
        """A ramp without length."""
        low, high = self.position.low_freq_factor, self.position.high_freq_factor
        return f"needs high_freq_factor > low_freq_factor, got {high} and {low}" if high <= low else ""

    def frequencies(self, size: int, trained_length: int) -> Tensor:
        """Divided by the factor as far as they are not kept."""
        low, high = self.position.low_freq_factor, self.position.high_freq_factor
        unscaled = super().frequencies(size, trained_length)
        rotations = unscaled * trained_length / (2 * math.pi)
        kept = ((rotations - low) / (high - low)).clamp(0, 1)
        return (kept + (1 - kept) / self.position.factor) * unscaled

    def rope_parameters(self, attention: str, rotary_size: int, trained_length: int) -> dict[str, Any]:
        """The same under Hugging Face's names."""
        return {
            "rope_type": "llama3", "rope_theta": self.position.rope_theta, "factor": self.position.factor,
            "low_freq_factor": self.position.low_freq_factor, "high_freq_factor": self.position.high_freq_factor,
            "original_max_position_embeddings": trained_length,
        }  # fmt: skip
