"""Configuration of the position map."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class PositionConfig(BaseModel):
    """A map from the distance r = i - j to the rotation between a query i and a key j."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: Literal["rope", "none", "pi", "ntk", "ntk-mixed", "yarn", "rerope", "leaky-rerope"] = Field(
        default="rope", description="The map; leaky-rerope with leak < 1 is inverse Leaky ReRoPE."
    )
    rope_theta: float = Field(default=10000.0, gt=1, description="Base of the rotary frequencies.")
    window: int | None = Field(default=None, description="rerope, leaky-rerope: distances below it are exact (tokens).")
    leak: float | None = Field(
        default=None, description="leaky-rerope: k of the posts, a step of 1/k beyond the window; below 1 is the inverse."
    )
    factor: float = Field(
        default=1.0, ge=1, description="pi, ntk, ntk-mixed, yarn: context extension s = evaluated / trained length."
    )
    trained_length: int | None = Field(
        default=None,
        gt=0,
        description="yarn, log_n: length L_tr (tokens) the model was trained at. Default train.sequence_length.",
    )
    mixed_exponent: float = Field(
        default=0.625, ge=0, le=1, description="ntk-mixed: exponent c (Su 2023, kexue.fm/archives/9706); the code used 0.75."
    )
    yarn_ramp: Literal["turns", "index"] = Field(
        default="turns",
        description="yarn: ramp linear in the rotations (turns; the paper) or in the index (code in circulation, DeepSeek).",
    )
    log_n: Literal["none", "trained", "inference"] = Field(
        default="none",
        description="Scale q by log(n)/log(L_tr): trained and evaluated with it (unclipped), or evaluated only (at least 1).",
    )

    def evaluation_values(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Values of another map that evaluates a network trained with this one: what training depends on stays unless given."""
        return {name: getattr(self, name) for name in ("rope_theta", "trained_length", "log_n")} | dict(values)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.log_n != "none" and self.trained_length == 1:
            raise ValueError(f"log_n = '{self.log_n}' divides by log(trained_length), which is 0 for 1; use 2 or more")
        windowed = self.kind in ("rerope", "leaky-rerope")
        if windowed and (self.window is None or self.window < 1):
            raise ValueError(f"kind = '{self.kind}' needs window >= 1 (tokens), got {self.window}")
        if not windowed and self.window is not None:
            raise ValueError(f"window = {self.window} has no meaning for kind = '{self.kind}'; remove it or use rerope")
        if self.kind == "leaky-rerope" and (self.leak is None or self.leak <= 0):
            raise ValueError(f"kind = 'leaky-rerope' needs leak > 0 (1/leak is the step beyond the window), got {self.leak}")
        if self.kind != "leaky-rerope" and self.leak is not None:
            raise ValueError(f"leak = {self.leak} has no meaning for kind = '{self.kind}'; remove it or use leaky-rerope")
        scaled = self.kind in ("pi", "ntk", "ntk-mixed", "yarn")
        if not scaled and self.factor != 1.0:
            raise ValueError(f"factor = {self.factor} has no meaning for kind = '{self.kind}'; use pi, ntk, ntk-mixed or yarn")
        return self
