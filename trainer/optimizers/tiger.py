"""Tiger (Su 2023, kexue.fm/archives/9512): the sign of the momentum, at a rate relative to the RMS of each matrix.

    m <- beta m + (1 - beta) g                      momentum first (Lion: last)
    p <- p - rate (sign(m) + decay p)

The momentum is linear in the gradient, so adding micro-batches to it one by one is exact, with beta at the first of them and 1
at the others (Su 2021, kexue.fm/archives/8634).
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from trainer.optimizers.rule import Block, Statistic, UpdateRule, average_

VECTOR_SHARE = 0.5
"""Gains and biases get this share of the learning rate, whatever their RMS (Amos; Su 2022, kexue.fm/archives/9344)."""

SHRINK = 0.99
"""Under `non_finite = "shrink"`: factor of the distance to the centre of the initialisation."""

RELATIVE_RATES = (1e-5, 0.05)
"""A rate outside this range was probably meant as an absolute one, or in percent: published rates are 1e-3 to 2e-3."""


class Tiger(UpdateRule):
    """Tiger. Its learning rate is relative to the RMS of each matrix."""

    learning_rate: float = Field(default=1e-3, gt=0, description="Peak rate, relative to the RMS of each matrix.")
    beta: float = Field(default=0.965, ge=0, lt=1, description="Momentum coefficient.")
    weight_decay: float = Field(default=0.01, ge=0, description="Decoupled decay, multiplied by the rate.")
    rms_floor: float | None = Field(
        default=None,
        gt=0,
        description="Least RMS that scales a matrix's learning rate, so that a matrix of zeros is updated. Default: for each "
        "tensor a tenth of its initial standard deviation (docs/optimizers.md).",
    )
    embedding_rms: Literal["matrix", "row"] = Field(
        default="matrix", description="RMS that scales the embedding's rate, of the whole tensor or of each row."
    )
    non_finite: Literal["skip", "shrink"] = Field(
        default="skip",
        description="A step with a NaN or infinite gradient: skip leaves the weights alone, shrink (not ZeRO 3) moves them by "
        "1 % towards the centre of their initialisation (docs/optimizers.md).",
    )

    moves_absent_rows: ClassVar[bool] = True
    takes_scale: ClassVar[bool] = True

    @property
    def why_not_folded(self) -> str:
        return ""

    def rate_and_decay(self, kind: str, learning_rate: float) -> tuple[float, float]:
        if kind in ("gain", "bias"):
            return VECTOR_SHARE * learning_rate, 0.0
        return learning_rate, self.weight_decay

    def relative_to(self, kind: str) -> Statistic | None:
        if kind in ("gain", "bias"):
            return None
        return Statistic("values", "row" if kind == "embedding" and self.embedding_rms == "row" else "matrix")

    def floor(self, initial: float) -> float:
        return self.rms_floor or initial

    def scalars(self, number: int, decays: bool = True, scale: Any = 1.0) -> dict[str, Any]:
        return {"keep": self.beta if decays else 1.0, "take": (1.0 - self.beta) * scale}

    @staticmethod
    def accumulate(state: dict[str, Tensor], gradient: Tensor, scalars: Mapping[str, Any]) -> None:
        average_(state["momentum"], gradient, scalars["keep"], scalars["take"])

    @staticmethod
    def direction(block: Block, scalars: Mapping[str, Any]) -> Tensor:
        return block.state["momentum"].sign()

    @property
    def recovers(self) -> bool:
        return self.non_finite == "shrink"

    def recover(self, values: Tensor, centre: float, bad: Any) -> None:
        """values <- centre + 0.99 (values - centre) (Su 2023)."""
        if not self.recovers:
            return
        if isinstance(bad, Tensor):
            lost = bad.to(values.dtype) * (1.0 - SHRINK)
            values.mul_(1.0 - lost)
            if centre:
                values.add_(lost * centre)
        elif bad:
            values.mul_(SHRINK)
            if centre:
                values.add_((1.0 - SHRINK) * centre)

    def unused(self, kinds: set[str]) -> str:
        if self.embedding_rms == "matrix" or "embedding" in kinds:
            return ""
        return "embedding_rms = 'row' scales Tiger's rate of the embedding, which another rule moves; remove it"

    def remarks(self, section: str) -> list[str]:
        low, high = RELATIVE_RATES
        if low <= self.learning_rate <= high:
            return []
        return [
            f"{section}.learning_rate = {self.learning_rate:g} looks like an absolute rate: Tiger's is relative to the RMS of "
            f"each matrix, 1e-3 to 2e-3 as published, sensible between {low:g} and {high:g}"
        ]
