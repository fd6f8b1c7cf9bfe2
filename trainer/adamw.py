"""AdamW (Loshchilov and Hutter, 2019) over flat tensors: torch's fused kernel, with the step count handed in."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

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
    if isinstance(scale, Tensor) or scale != 1.0:
        for gradient in gradients:
            gradient.mul_(scale)
    counts = [torch.full((), step - 1.0, dtype=torch.float32, device=value.device) for value in values]
    found_inf = bad.float() if isinstance(bad, Tensor) else None
    adamw(
        values, gradients, momenta, second_moments, [], counts, found_inf=found_inf,
        fused=True, amsgrad=False, beta1=betas[0], beta2=betas[1], lr=rate, weight_decay=decay, eps=eps, maximize=False,
    )  # fmt: skip
    if isinstance(bad, Tensor):
        rest_(momenta, second_moments, tuple(torch.where(bad, beta, 1.0) for beta in betas))


def rest_(momenta: list[Tensor], second_moments: list[Tensor], betas: Any) -> None:
    """A step without usable gradients: both moments decay, the values stay."""
    for momentum, second_moment in zip(momenta, second_moments, strict=True):
        momentum.mul_(betas[0])
        second_moment.mul_(betas[1])
