"""Updates as kernels that read each tensor once and write it once; torch.compile makes one loop of each.

Tiger and Lion: u = sign(a m + b g), m <- c m + d g with four numbers; Tiger's a = c and b = d, Lion's differ. And the two
halves of Tiger under fold, rounded stochastically to bfloat16. trainer/tiger.py, lion.py and fold.py say the same operation
by operation, which needs no compiler.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trainer import rounding
from trainer.config import OptimizerConfig


def numbers(settings: OptimizerConfig, rate: Any, decay: float, scale: Any, bad: Any, device: torch.device) -> Tensor:
    """What the kernel takes beside the three tensors, in one float32 tensor [7]: a, b, c, d, rate, decay, bad (0 or 1)."""
    first, last = settings.coefficients[0], settings.coefficients[-1]
    chosen = (first, (1.0 - first) * scale, last, (1.0 - last) * scale, rate, decay, bad)
    return packed(device, *chosen)


def packed(device: torch.device, *chosen: Any) -> Tensor:
    """Numbers, some of them perhaps 0-dim tensors of the device, as one float32 tensor there."""
    if device.type == "cpu":
        return torch.tensor(chosen, dtype=torch.float32)
    filled = (x if isinstance(x, Tensor) else torch.full((), x, device=device) for x in chosen)  # a copy would wait
    return torch.stack([x.to(torch.float32) for x in filled])


def one_pass(values: Tensor, momentum: Tensor, gradient: Tensor, numbers: Tensor) -> None:
    """One step of Tiger or Lion in place; if bad, the momentum decays and the values stay."""
    a, b, c, d, rate, decay, bad = numbers.unbind()
    usable = torch.where(bad > 0, 0.0, gradient)
    step = torch.sign(a * momentum + b * usable) + decay * values
    momentum.copy_(c * momentum + d * usable)
    values.copy_(torch.where(bad > 0, values, values - rate * step))


def fold(momentum: Tensor, gradient: Tensor, numbers: Tensor, a: Tensor, b: Tensor, h: Tensor) -> None:
    """One micro-batch into a bfloat16 momentum [rows, columns]; numbers = (decay, weight); a, b, h of rounding.Draw."""
    decay, weight = numbers.unbind()
    folded = decay * momentum.float() + weight * gradient.float()
    momentum.copy_(rounding.rounded(folded, a, b, h))


def move(values: Tensor, momentum: Tensor, rate: Tensor, decay: Tensor, a: Tensor, b: Tensor, h: Tensor) -> None:
    """bfloat16 values [rows, columns] along the sign of the momentum; rate [rows or 1, 1], decay 0-dim."""
    old = values.float()
    moved = old - rate * (torch.sign(momentum.float()) + decay * old)
    values.copy_(rounding.rounded(moved, a, b, h))


@functools.cache
def compiled(kernel: Callable[..., None]) -> Callable[..., None]:
    """A kernel, compiled at its first call for tensors of any size."""
    return torch.compile(kernel, dynamic=True, fullgraph=True)
