"""Updates as kernels that read each tensor once and write it once; torch.compile makes one loop of each.

Tiger and Lion: u = sign(a m + b g), m <- c m + d g with four numbers; Tiger's a = c and b = d, Lion's differ. And the parts
of Tiger under fold, rounded stochastically to bfloat16. trainer/tiger.py, lion.py and fold.py say the same operation
by operation, which needs no compiler.

Numbers that change from step to step reach a kernel in tensors, made for all parameters at once. A kernel is compiled for
tensors of any size: once for matrices, once more for square ones, for vectors, and where rows have rates of their own. That
is at most six graphs; torch gives up at eight.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from trainer import rounding
from trainer.config import OptimizerConfig

LARGEST = 2.0**64
"""Elements of a gradient from here on have a square that float32 does not hold: they count as infinite."""


def numbers(settings: OptimizerConfig, rates: Tensor, decays: Sequence[float], scale: Any, bad: Any) -> Tensor:
    """What the kernel takes beside three tensors, float32 [parameters, 7]: a, b, c, d, rate, decay, bad (0 or 1)."""
    first, last = settings.coefficients[0], settings.coefficients[-1]
    each = [(first, 1.0 - first, last, 1.0 - last, 0.0, decay, 1.0, 0.0) for decay in decays]  # the last to align the rows
    table = sent(each, rates.device, torch.float64)
    table[:, 1:4:2] *= scale
    table[:, 4] = rates
    table[:, 6] *= bad
    return table.float()[:, :7]


def sent(values: Any, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers of the host as a tensor of the device, without waiting for it."""
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def one_pass(values: Tensor, momentum: Tensor, gradient: Tensor, numbers: Tensor) -> None:
    """One step of Tiger or Lion in place; if bad, the momentum decays and the values stay."""
    a, b, c, d, rate, decay, bad = numbers.unbind()
    usable = torch.where(bad > 0, 0.0, gradient)
    step = torch.sign(a * momentum + b * usable) + decay * values
    momentum.copy_(c * momentum + d * usable)
    values.copy_(torch.where(bad > 0, values, values - rate * step))


def fold(momentum: Tensor, gradient: Tensor, squares: Tensor, numbers: Tensor, a: Tensor, b: Tensor, h: Tensor) -> None:
    """One micro-batch into a bfloat16 momentum [rows, columns], 6 bytes per element.

    Args:
        gradient: bfloat16; what is not finite in it, or beyond LARGEST, adds nothing.
        squares: float32 [rows, 1]; the sum of squares of each row is added.
        numbers: float32 [2], decay of the momentum and weight of the gradient.
        a, b, h: of rounding.Draw.
    """
    decay, weight = numbers.unbind()
    wide = gradient.float()
    squares.add_(wide.square().sum(1, keepdim=True))
    usable = torch.where(wide.abs() < 2.0**64, wide, 0.0)  # LARGEST, which by its name would be an input in float64
    momentum.copy_(rounding.rounded(decay * momentum.float() + weight * usable, a, b, h))


def store(momentum: Tensor, mean: Tensor, a: Tensor, b: Tensor, h: Tensor) -> None:
    """A float32 mean over ranks into the bfloat16 momentum [rows, columns] of this rank, 6 bytes per element."""
    momentum.copy_(rounding.rounded(mean, a, b, h))


def move(values: Tensor, momentum: Tensor, rate: Tensor, decay: Tensor, a: Tensor, b: Tensor, h: Tensor) -> None:
    """bfloat16 values [rows, columns] along the sign of the momentum; rate [rows or 1, 1], decay 0-dim."""
    old = values.float()
    moved = old - rate * (torch.sign(momentum.float()) + decay * old)
    values.copy_(rounding.rounded(moved, a, b, h))


@functools.cache
def compiled(kernel: Callable[..., None]) -> Callable[..., None]:
    """A kernel, compiled at its first call for tensors of any size.

    On a GPU rows and columns are dimensions of it: else every element would be divided by the width to find its row.
    """
    return torch.compile(kernel, dynamic=True, fullgraph=True, options={"triton.prefer_nd_tiling": True})
