"""YaRN: low frequencies are interpolated, high ones kept, logits scaled (Peng et al. 2023, arXiv 2309.00071)."""

import math
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from model.positions.maps.scaled import ScaledKeys, ScaledMap


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """What queries and keys are multiplied by: the paper's temperature, and DeepSeek's g(mscale)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


class YarnKeys(ScaledKeys):
    """Keys of YaRN."""

    yarn_ramp: Literal["rotations", "index"] = Field(
        default="rotations",
        description="yarn: ramp linear in the rotations (the paper) or in the index (code in circulation, DeepSeek).",
    )
    beta_fast: float = Field(
        default=32.0, gt=0, description="yarn: frequencies with more rotations in trained_length are kept."
    )
    beta_slow: float = Field(
        default=1.0, gt=0, description="yarn: frequencies with fewer rotations in trained_length are divided by factor."
    )
    yarn_truncate: bool = Field(
        default=True, description="yarn_ramp = index: round the ends of the ramp outwards to whole indices."
    )
    attention_factor: float | None = Field(
        default=None, gt=0, description="yarn: multiplies queries and keys, so logits by its square; none = 1 + 0.1 ln factor."
    )
    rotated_factor: float = Field(
        default=1.0,
        gt=0,
        description="yarn: multiplies the rotated part of queries and keys in addition; in MLA a part of a head.",
    )


class Yarn(ScaledMap[YarnKeys]):
    """Frequencies between theta_i and theta_i / factor, and logits times the square of the attention factor."""

    keys = YarnKeys
    stock = "yarn_ramp = 'index'"

    def problem(self) -> str:
        """A ramp without length, or one without indices to round."""
        fast, slow = self.position.beta_fast, self.position.beta_slow
        if fast <= slow:
            return f"needs beta_fast > beta_slow, got {fast} and {slow}"
        if self.position.yarn_ramp == "rotations" and not self.position.yarn_truncate:
            return (
                "with yarn_ramp = 'rotations' has no indices to round; remove yarn_truncate = false or use yarn_ramp = 'index'"
            )
        return ""

    def frequencies(self, size: int, trained_length: int) -> Tensor:
        """Divided by the factor as far as they are not kept."""
        unscaled = super().frequencies(size, trained_length)
        kept = self._kept(unscaled, size, trained_length)
        return (kept + (1 - kept) / self.position.factor) * unscaled

    def query_scale(self) -> float:
        """The attention factor squared: the paper's temperature, on queries and keys, put on the queries alone."""
        return self._attention_factor() ** 2

    def rotated_factor(self) -> float:
        """As given."""
        return self.position.rotated_factor

    def rope_parameters(self, attention: str, rotary_size: int, trained_length: int) -> dict[str, Any] | None:
        """With the ramp in the index.

        Hugging Face multiplies by attention_factor what is rotated: whole heads of grouped-query attention, a part of those of
        latent attention, whose scores as a whole are multiplied by (1 + 0.1 mscale_all_dim ln factor)^2.
        """
        position, default = self.position, yarn_mscale(self.position.factor)
        if position.yarn_ramp != "index":
            return None
        found: dict[str, Any] = {
            "rope_type": "yarn", "rope_theta": position.rope_theta, "factor": position.factor,
            "beta_fast": position.beta_fast, "beta_slow": position.beta_slow,
            "original_max_position_embeddings": trained_length,
        }  # fmt: skip
        if not position.yarn_truncate:
            found["truncate"] = False
        if attention == "gqa":
            rotated = self._attention_factor() * position.rotated_factor
            return found if rotated == default else {**found, "attention_factor": rotated}
        found["attention_factor"] = position.rotated_factor
        if self._attention_factor() == 1:
            return found
        if default == 1:
            return None  # without an extension no mscale_all_dim changes the scores
        return {**found, "mscale_all_dim": (self._attention_factor() - 1) / (default - 1)}

    def _attention_factor(self) -> float:
        given = self.position.attention_factor
        return yarn_mscale(self.position.factor) if given is None else given

    def _kept(self, unscaled: Tensor, size: int, trained_length: int) -> Tensor:
        """Share of each frequency that is not interpolated: 1 from beta_fast rotations on, 0 up to beta_slow."""
        fast, slow = self.position.beta_fast, self.position.beta_slow
        if self.position.yarn_ramp == "rotations":
            rotations = unscaled * trained_length / (2 * math.pi)
            return ((rotations - slow) / (fast - slow)).clamp(0, 1)

        def index_of(rotations: float) -> float:
            return size * math.log(trained_length / (rotations * 2 * math.pi)) / (2 * math.log(self.position.rope_theta))

        low, high = index_of(fast), index_of(slow)
        if self.position.yarn_truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, size - 1)
        ramp = (torch.arange(size // 2, dtype=torch.float64) - low) / ((high - low) or 0.001)  # below 0 all are kept, as there
        return 1 - ramp.clamp(0, 1)
