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


def numbers(settings: OptimizerConfig, rate: Any, decay: float, scale: Any, bad: Any, device: torch.device) -> Tensor:
    """What the kernel takes beside the three tensors, in one float32 tensor [7]: a, b, c, d, rate, decay, bad (0 or 1)."""
    first, last = settings.coefficients[0], settings.coefficients[-1]
    chosen = (first, (1.0 - first) * scale, last, (1.0 - last) * scale, rate, decay, bad)
    if any(isinstance(x, Tensor) for x in chosen):
        return torch.stack([torch.as_tensor(x, dtype=torch.float32, device=device) for x in chosen])
    return torch.tensor(chosen, dtype=torch.float32, device=device)


def one_pass(values: Tensor, momentum: Tensor, gradient: Tensor, numbers: Tensor) -> None:
    """One step of Tiger or Lion in place; if bad, the momentum decays and the values stay."""
    a, b, c, d, rate, decay, bad = numbers.unbind()
    usable = torch.where(bad > 0, 0.0, gradient)
    step = torch.sign(a * momentum + b * usable) + decay * values
    momentum.copy_(c * momentum + d * usable)
    values.copy_(torch.where(bad > 0, values, values - rate * step))


@functools.cache
def compiled() -> Callable[..., None]:
    """The kernel, compiled at its first call for tensors of any length."""
    return torch.compile(one_pass, dynamic=True, fullgraph=True)
