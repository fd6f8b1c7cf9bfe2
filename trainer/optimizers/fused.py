"""Updates as kernels that read each tensor once and write it once; torch.compile makes one loop of each.

Tiger and Lion: u = sign(a m + b g), m <- c m + d g with four coefficients; Tiger has a = c and b = d. And the parts of Tiger
under fold, rounded stochastically to bfloat16. trainer/optimizers/tiger.py, lion.py and trainer/engines/fold.py do the same
operation by operation, without a compiler.

Scalars that change from step to step reach a kernel in tensors, made for all parameters at once. A kernel is compiled for
tensors of any size: once for matrices, once more for square ones, for vectors, and where rows have rates of their own. That
is at most six graphs; torch gives up at eight.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.config import OptimizerConfig
from trainer.optimizers import rounding

GRADIENT_LIMIT = 2.0**64
"""From here on the square of an element overflows float32, so such an element of a gradient counts as infinite."""


def kernel_scalars(settings: OptimizerConfig, rates: Tensor, decays: Sequence[float], scale: Any, bad: Any) -> Tensor:
    """The scalars of sign_update, float32 [parameters, 7]: a, b, c, d, rate, decay, bad (0 or 1)."""
    first, last = settings.coefficients[0], settings.coefficients[-1]
    rows = [(first, 1.0 - first, last, 1.0 - last, 0.0, decay, 1.0, 0.0) for decay in decays]  # the last to align the rows
    table = to_device(rows, rates.device, torch.float64)
    table[:, 1:4:2] *= scale
    table[:, 4] = rates
    table[:, 6] *= bad
    return table.float()[:, :7]


def to_device(values: Any, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Floats of the host as a tensor on the device, without waiting for it."""
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def sign_update(values: Tensor, momentum: Tensor, gradient: Tensor, scalars: Tensor) -> None:
    """One update of Tiger or Lion in place, `scalars` of kernel_scalars; if bad, the momentum decays and the values stay."""
    a, b, c, d, rate, decay, bad = scalars.unbind()
    usable = torch.where(bad > 0, 0.0, gradient)
    step = torch.sign(a * momentum + b * usable) + decay * values
    momentum.copy_(c * momentum + d * usable)
    values.copy_(torch.where(bad > 0, values, values - rate * step))


def fold_gradient(
    momentum: Tensor, gradient: Tensor, squares: Tensor, scalars: Tensor, a: Tensor, b: Tensor, h: Tensor
) -> None:
    """Add one micro-batch's gradient to a bfloat16 momentum [rows, columns], 6 bytes per element.

    Args:
        gradient: bfloat16; elements that are not finite, or reach GRADIENT_LIMIT, add nothing.
        squares: float32 [rows, 1]; the sum of squares of each row is added.
        scalars: float32 [2], decay of the momentum and weight of the gradient.
        a, b, h: of rounding.SliceNoise.
    """
    decay, weight = scalars.unbind()
    wide = gradient.float()
    squares.add_(wide.square().sum(1, keepdim=True))
    usable = torch.where(wide.abs() < 2.0**64, wide, 0.0)  # GRADIENT_LIMIT; as a global it would be a float64 input
    momentum.copy_(rounding.round_stochastically(decay * momentum.float() + weight * usable, a, b, h))


def store_mean(momentum: Tensor, mean: Tensor, a: Tensor, b: Tensor, h: Tensor) -> None:
    """Round a float32 mean over ranks into this rank's bfloat16 momentum [rows, columns], 6 bytes per element."""
    momentum.copy_(rounding.round_stochastically(mean, a, b, h))


def update_values(values: Tensor, momentum: Tensor, rate: Tensor, decay: Tensor, a: Tensor, b: Tensor, h: Tensor) -> None:
    """Tiger's update of bfloat16 values [rows, columns]; rate [rows or 1, 1], decay 0-dim. 6 bytes per element."""
    old = values.float()
    new = old - rate * (torch.sign(momentum.float()) + decay * old)
    values.copy_(rounding.round_stochastically(new, a, b, h))


@functools.cache
def compiled(kernel: Callable[..., None]) -> Callable[..., None]:
    """A kernel, compiled at its first call for tensors of any size.

    On a GPU rows and columns are dimensions of the launch: else every element's index would be divided by the width to find
    its row.
    """
    return torch.compile(kernel, dynamic=True, fullgraph=True, options={"triton.prefer_nd_tiling": True})
