"""Lion (Chen et al. 2023, arxiv.org/abs/2302.06675; Su 2023, kexue.fm/archives/9473): the sign of a mix, then the momentum.

u <- sign(beta1 m + (1 - beta1) g)
p <- p - rate (u + decay p)
m <- beta2 m + (1 - beta2) g
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from trainer.optimizers.rule import Betas, Block, UpdateRule, average_


class Lion(UpdateRule):
    """Lion."""

    learning_rate: float = Field(default=1e-4, gt=0, description="Peak rate.")
    betas: Betas = Field(default=(0.95, 0.98), description="Coefficients of the momentum: in the sign, and of its average.")
    weight_decay: float = Field(default=0.01, ge=0, description="Decoupled decay, multiplied by the rate.")

    moves_absent_rows: ClassVar[bool] = True
    takes_scale: ClassVar[bool] = True

    @property
    def why_not_folded(self) -> str:
        return "Lion mixes momentum and mean gradient in two ways and so needs both"

    def scalars(self, number: int, decays: bool = True, scale: Any = 1.0) -> dict[str, Any]:
        mix, keep = self.betas
        return {"mix": mix, "add": (1.0 - mix) * scale, "keep": keep, "take": (1.0 - keep) * scale}

    @staticmethod
    def accumulate(state: dict[str, Tensor], gradient: Tensor, scalars: Mapping[str, Any]) -> None:
        average_(state["momentum"], gradient, scalars["keep"], scalars["take"])

    @staticmethod
    def direction(block: Block, scalars: Mapping[str, Any]) -> Tensor:
        momentum, mix, add = block.state["momentum"], scalars["mix"], scalars["add"]
        if not isinstance(add, Tensor) and add == 1.0 - mix:
            return torch.lerp(momentum, block.gradient, add).sign_()  # one pass for the usual case
        mixed = momentum.clone()
        average_(mixed, block.gradient, mix, add)
        return mixed.sign_()

    @classmethod
    def step(cls, block: Block, scalars: Mapping[str, Any]) -> Tensor:
        """`direction` first: it mixes the momentum before this gradient."""
        direction = cls.direction(block, scalars)
        cls.accumulate(block.state, block.gradient, scalars)
        return direction
