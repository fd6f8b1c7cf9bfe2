"""AdamW (Loshchilov and Hutter, 2019) over flat tensors: torch's fused kernel, with the step count handed in."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

BETAS = (0.9, 0.95)
"""Of the embedding's AdamW beside Tiger or Lion, whose own coefficients mean something else."""


def step_(
    values: list[Tensor],
    gradients: list[Tensor],
    momenta: list[Tensor],
    second_moments: list[Tensor],
    *,
    step: int,
    betas: tuple[float, float],
    rate: float,
    decay: float,
    eps: float,
    scale: Any = 1.0,
    bad: Any = False,
) -> None:
    """One step of AdamW in place, for tensors of one device and dtype.

    Args:
        gradients: read; multiplied by `scale`.
        step: number of this update, from 1; the bias corrections follow from it, so there is no counter to save.
        scale: float or 0-dim (clipping).
        bad: bool or 0-dim bool: a gradient is not finite, so the moments decay and the values stay.
    """
    if bad is True:
        rest_(momenta, second_moments, betas)
        return
    divisor = None
    if isinstance(scale, Tensor):
        divisor = scale.reciprocal().float()  # the kernel divides, as it reads; a bad step is left before that
    elif scale != 1.0:
        for gradient in gradients:
            gradient.mul_(scale)
    counts = list(torch.full((len(values),), step - 1.0, dtype=torch.float32, device=values[0].device).unbind())
    found_inf = bad.float() if isinstance(bad, Tensor) else None
    adamw(
        values, gradients, momenta, second_moments, [], counts, grad_scale=divisor, found_inf=found_inf,
        fused=True, amsgrad=False, beta1=betas[0], beta2=betas[1], lr=rate, weight_decay=decay, eps=eps, maximize=False,
    )  # fmt: skip
    if isinstance(bad, Tensor):
        _rest_if_(bad, momenta, second_moments, betas)


def rest_(momenta: list[Tensor], second_moments: list[Tensor], betas: tuple[float, float]) -> None:
    """A step without usable gradients: both moments decay, the values stay."""
    for momentum, second_moment in zip(momenta, second_moments, strict=True):
        momentum.mul_(betas[0])
        second_moment.mul_(betas[1])


def _rest_if_(bad: Tensor, momenta: list[Tensor], second_moments: list[Tensor], betas: tuple[float, float]) -> None:
    """The same where the device alone knows whether the step is bad: x - (1 - beta) x, by torch's fused SGD with x as its own
    gradient, whose kernels end at once where `found_inf` is 1. A product with 1 would move both moments in every step."""
    for moments, beta in ((momenta, betas[0]), (second_moments, betas[1])):
        sgd(
            moments, moments, [None] * len(moments), fused=True, found_inf=(~bad).float(), lr=1.0 - beta,
            weight_decay=0.0, momentum=0.0, dampening=0.0, nesterov=False, maximize=False,
        )  # fmt: skip
