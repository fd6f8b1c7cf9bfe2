"""Lion (Chen et al. 2023, arxiv.org/abs/2302.06675; Su 2023, kexue.fm/archives/9473): the sign of a mix, then the momentum.

u <- sign(beta1 m + (1 - beta1) g)
p <- p - rate (u + decay p)
m <- beta2 m + (1 - beta2) g
"""

from typing import Any

import torch
from torch import Tensor

from trainer.optimizers.tiger import accumulate_, apply_step_


def lion_(
    values: Tensor,
    momentum: Tensor,
    gradient: Tensor | None,
    betas: tuple[float, float],
    rate: Any,
    decay: float,
    scale: Any = 1.0,
) -> None:
    """One step of Lion in place.

    Args:
        gradient: None for a bad one: the momentum decays and the values stay.
        rate: float, or a tensor that broadcasts (0 for rows that are not updated).
        scale: factor of the gradient (clipping); float or 0-dim.
    """
    if gradient is not None:
        if isinstance(scale, Tensor) or scale != 1.0:
            mixed = momentum.clone()
            accumulate_(mixed, gradient, betas[0], (1.0 - betas[0]) * scale)
        else:
            mixed = torch.lerp(momentum, gradient, 1.0 - betas[0])  # one pass for the usual case
        apply_step_(values, mixed.sign_(), rate, decay)
    accumulate_(momentum, gradient, betas[1], (1.0 - betas[1]) * scale)
