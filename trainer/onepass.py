"""Tiger and Lion as one kernel that reads values, momentum and gradient once and writes values and momentum once.

Both rules are u = sign(a m + b g), m <- c m + d g with four numbers: Tiger's a = c and b = d, Lion's differ. torch.compile
makes one loop of it; trainer/tiger.py and lion.py say the same operation by operation, which needs no compiler.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trainer.config import OptimizerConfig


def numbers(settings: OptimizerConfig, rate: Any, decay: float, scale: Any, bad: Any, device: torch.device) -> list[Tensor]:
    """What the kernel takes beside the three tensors, 0-dim on the device: a, b, c, d, rate, decay, bad."""
    first, last = settings.coefficients[0], settings.coefficients[-1]
    coefficients = (first, (1.0 - first) * scale, last, (1.0 - last) * scale, rate, decay)
    return [_number(x, torch.float32, device) for x in coefficients] + [_number(bad, torch.bool, device)]


def _number(x: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    return x.to(dtype) if isinstance(x, Tensor) else torch.full((), x, dtype=dtype, device=device)


def one_pass(
    values: Tensor, momentum: Tensor, gradient: Tensor,
    a: Tensor, b: Tensor, c: Tensor, d: Tensor, rate: Tensor, decay: Tensor, bad: Tensor,
) -> None:  # fmt: skip
    """One step of Tiger or Lion in place; if `bad`, the momentum decays and the values stay."""
    usable = torch.where(bad, 0.0, gradient)
    step = torch.sign(a * momentum + b * usable) + decay * values
    momentum.copy_(c * momentum + d * usable)
    values.copy_(torch.where(bad, values, values - rate * step))


@functools.cache
def compiled() -> Callable[..., None]:
    """The kernel, compiled at its first call for tensors of any length."""
    return torch.compile(one_pass, dynamic=True, fullgraph=True)
