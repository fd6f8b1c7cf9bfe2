"""Lion (Chen et al., 2023; kexue 9473): the sign of a mix of momentum and gradient, then the momentum.

u <- sign(beta1 m + (1 - beta1) g)
p <- p - rate (u + decay p)
m <- beta2 m + (1 - beta2) g
"""

from typing import Any

import torch
from torch import Tensor

from trainer.tiger import along_, fold_


def step_(
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
        rate: float, or a tensor that broadcasts (0 for rows that stay).
        scale: what the gradient is multiplied by (clipping); float or 0-dim.
    """
    if gradient is not None:
        if isinstance(scale, Tensor) or scale != 1.0:
            mixed = momentum.clone()
            fold_(mixed, gradient, betas[0], (1.0 - betas[0]) * scale)
        else:
            mixed = torch.lerp(momentum, gradient, 1.0 - betas[0])  # one pass for the usual case
        along_(values, mixed.sign_(), rate, decay)
    fold_(momentum, gradient, betas[1], (1.0 - betas[1]) * scale)
