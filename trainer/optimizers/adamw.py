"""AdamW (Loshchilov and Hutter 2019, arxiv.org/abs/1711.05101) over flat tensors, by torch's fused kernel."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from trainer.optimizers.rule import Betas, Block, Granularity, RuleStep, RuleTensors, UpdateRule, average_
from trainer.optimizers.torch_internals import decay_unless, fused_adamw


class AdamW(UpdateRule):
    """AdamW."""

    learning_rate: float = Field(default=1e-3, gt=0, description="Peak rate.")
    betas: Betas = Field(default=(0.9, 0.95), description="Coefficients of the mean gradient and of the mean square.")
    weight_decay: float = Field(default=0.1, ge=0, description="Decoupled decay, multiplied by the rate.")
    eps: float = Field(default=1e-8, gt=0, description="Added to the square root of the mean square.")

    states: ClassVar[Mapping[str, Granularity]] = {"momentum": "element", "second_moment": "element"}
    library_kernel: ClassVar[bool] = True

    @property
    def why_not_folded(self) -> str:
        return "AdamW needs the square of the mean gradient, which is not known before the last micro-batch"

    def scalars(self, number: int, decays: bool = True, scale: Any = 1.0) -> dict[str, Any]:
        first, second = self.betas
        averages = {"keep": first, "take": 1.0 - first, "keep_square": second, "take_square": 1.0 - second}
        return averages | {"mean": 1.0 / (1.0 - first**number), "root": (1.0 - second**number) ** -0.5, "eps": self.eps}

    @staticmethod
    def accumulate(state: dict[str, Tensor], gradient: Tensor, scalars: Mapping[str, Any]) -> None:
        average_(state["momentum"], gradient, scalars["keep"], scalars["take"])
        average_(state["second_moment"], gradient.square(), scalars["keep_square"], scalars["take_square"])

    @staticmethod
    def direction(block: Block, scalars: Mapping[str, Any]) -> Tensor:
        root = block.state["second_moment"].sqrt() * scalars["root"]
        return block.state["momentum"] * scalars["mean"] / (root + scalars["eps"])

    def update_together(self, tensors: RuleTensors, step: RuleStep) -> None:
        momenta = [state["momentum"] for state in tensors.states]
        second_moments = [state["second_moment"] for state in tensors.states]
        if step.bad is True:
            for moments, beta in zip((momenta, second_moments), self.betas, strict=True):
                for moment in moments:
                    moment.mul_(beta)
            return
        divisor = None
        if isinstance(step.scale, Tensor):
            divisor = step.scale.reciprocal().float()  # the kernel divides as it reads; a bad step ends before that
        elif step.scale != 1.0:
            for gradient in tensors.gradients:
                gradient.mul_(step.scale)
        done = torch.full((len(momenta),), step.number - 1.0, dtype=torch.float32, device=momenta[0].device)
        found_inf = step.bad.float() if isinstance(step.bad, Tensor) else None
        fused_adamw(
            tensors.values, tensors.gradients, momenta, second_moments, list(done.unbind()), grad_scale=divisor,
            found_inf=found_inf, beta1=self.betas[0], beta2=self.betas[1], lr=step.rate, weight_decay=step.decay, eps=self.eps,
        )  # fmt: skip
        if isinstance(step.bad, Tensor):  # the device alone knows whether the step is bad
            decay_unless(~step.bad, momenta, self.betas[0])
            decay_unless(~step.bad, second_moments, self.betas[1])
