"""AdamW (Loshchilov and Hutter 2019, arxiv.org/abs/1711.05101) over flat tensors, by torch's fused kernel."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.optimizers.torch_internals import decay_unless, fused_adamw

BETAS = (0.9, 0.95)
"""Coefficients of the embedding's AdamW under Tiger or Lion, whose own betas mean something else."""


@dataclass(frozen=True)
class AdamWStep:
    """One update of tensors with the same weight decay."""

    number: int
    """From 1; the bias corrections follow from it, so there is no counter to save."""
    rate: float
    betas: tuple[float, float]
    decay: float
    eps: float


def adamw_(
    values: list[Tensor],
    gradients: list[Tensor],
    momenta: list[Tensor],
    second_moments: list[Tensor],
    step: AdamWStep,
    scale: Any = 1.0,
    bad: Any = False,
) -> None:
    """One step of AdamW in place, for tensors of one device and dtype.

    Args:
        gradients: multiplied by `scale`, in place if it is a float.
        scale: float or 0-dim (clipping).
        bad: bool or 0-dim bool: a gradient is not finite, so the moments decay and the values stay.
    """
    if bad is True:
        decay_moments_(momenta, second_moments, step.betas)
        return
    divisor = None
    if isinstance(scale, Tensor):
        divisor = scale.reciprocal().float()  # the kernel divides as it reads; a bad step ends before that
    elif scale != 1.0:
        for gradient in gradients:
            gradient.mul_(scale)
    counts = list(torch.full((len(values),), step.number - 1.0, dtype=torch.float32, device=values[0].device).unbind())
    found_inf = bad.float() if isinstance(bad, Tensor) else None
    fused_adamw(
        values, gradients, momenta, second_moments, counts, grad_scale=divisor, found_inf=found_inf,
        beta1=step.betas[0], beta2=step.betas[1], lr=step.rate, weight_decay=step.decay, eps=step.eps,
    )  # fmt: skip
    if isinstance(bad, Tensor):  # the device alone knows whether the step is bad
        decay_unless(~bad, momenta, step.betas[0])
        decay_unless(~bad, second_moments, step.betas[1])


def decay_moments_(momenta: list[Tensor], second_moments: list[Tensor], betas: tuple[float, float]) -> None:
    """A step without usable gradients: both moments decay, the values stay."""
    for momentum, second_moment in zip(momenta, second_moments, strict=True):
        momentum.mul_(betas[0])
        second_moment.mul_(betas[1])
