"""Updates as kernels that read each tensor once and write it once; torch.compile makes one loop of each.

They are made from a rule's `accumulate` and `direction`, with float32 masters or, under fold, bfloat16 rounded stochastically.
trainer/optimizers/step.py and trainer/engines/fold.py do the same operation by operation, without a compiler.

Scalars that change from step to step or with the configuration reach a kernel in tensors, made for all parameters at once. A
kernel is compiled for tensors of any size: once for matrices, once more for square ones, for vectors, and where rows have
rates of their own. That is at most six graphs; torch gives up at eight.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.optimizers import rounding
from trainer.optimizers.rule import Block, UpdateRule

GRADIENT_LIMIT = 2.0**64
"""From here on the square of an element overflows float32, so such an element of a gradient counts as infinite."""

Kernel = Callable[..., None]


def scalar_table(
    rules: Sequence[UpdateRule], number: int, rates_and_decays: tuple[Tensor, Sequence[float]], scale: Any, bad: Any
) -> Tensor:
    """The scalars of compiled updates, float32 [parameters, n]: scale, rate, decay, bad (0 or 1), then those of the rule at
    update `number`.

    The rows are padded to a multiple of 16 bytes, by which a kernel's inputs are aligned.
    """
    rates, decays = rates_and_decays
    own = [list(rule.scalars(number).values()) for rule in rules]
    width = rounding.aligned(4 + max(map(len, own)))
    rows = [[1.0, 0.0, d, 1.0, *more, *[0.0] * (width - 4 - len(more))] for d, more in zip(decays, own, strict=True)]
    table = to_device(rows, rates.device, torch.float64)
    table[:, 0] *= scale
    table[:, 1] = rates
    table[:, 3] *= bad
    return table.float()


def to_device(values: Any, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Floats of the host as a tensor on the device, without waiting for it."""
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def update_kernel(rule: type[UpdateRule]) -> Kernel:
    """One update of a flat parameter in place; if bad, states take a gradient of zero and the values stay."""
    names, keys = list(rule.states), scalar_names(rule)

    def update(values: Tensor, gradient: Tensor, states: list[Tensor], scalars: Tensor) -> None:
        scale, rate, decay, bad, *own = scalars.unbind()
        usable = torch.where(bad > 0, 0.0, gradient) * scale
        block = Block(values, usable, dict(zip(names, states, strict=True)), {})
        step = rule.step(block, dict(zip(keys, own, strict=False))) + decay * values
        values.copy_(torch.where(bad > 0, values, values - rate * step))

    return update


Noise = tuple[Tensor, Tensor, Tensor]
"""a, b and h of rounding.SliceNoise."""


def fold_kernel(rule: type[UpdateRule]) -> Kernel:
    """Add one micro-batch's gradient to bfloat16 states [rows, columns]: 6 bytes per element with one state.

    Elements of the bfloat16 gradient that are not finite, or reach GRADIENT_LIMIT, add nothing. Each row's sum of squares is
    added to `squares`, float32 [rows, 1].
    """
    names, keys = rule.element_states(), scalar_names(rule)

    def fold(states: list[Tensor], gradient: Tensor, squares: Tensor, scalars: Tensor, noise: list[Noise]) -> None:
        wide = gradient.float()
        squares.add_(wide.square().sum(1, keepdim=True))
        usable = torch.where(wide.abs() < 2.0**64, wide, 0.0)  # GRADIENT_LIMIT; as a global it would be a float64 input
        new = {name: state.float() for name, state in zip(names, states, strict=True)}
        rule.accumulate(new, usable, dict(zip(keys, scalars.unbind(), strict=True)))
        for name, state, bits in zip(names, states, noise, strict=True):
            state.copy_(rounding.round_stochastically(new[name], *bits))

    return fold


def move_kernel(rule: type[UpdateRule]) -> Kernel:
    """Move bfloat16 values [rows, columns] along `direction`; rate [rows or 1, 1], decay 0-dim. 6 bytes per element with one
    state."""
    names, keys = list(rule.states), scalar_names(rule)

    def move(
        values: Tensor, states: list[Tensor], rate: Tensor, decay: Tensor, scalars: Tensor, noise: Noise
    ) -> None:  # fmt: skip
        old = values.float()
        state = {name: state.float() for name, state in zip(names, states, strict=True)}
        block = Block(old, torch.zeros_like(old), state, {})
        direction = rule.direction(block, dict(zip(keys, scalars.unbind(), strict=True)))
        values.copy_(rounding.round_stochastically(old - rate * (direction + decay * old), *noise))

    return move


def store_mean(state: Tensor, mean: Tensor, noise: Noise) -> None:
    """Round a float32 mean over ranks into this rank's bfloat16 state [rows, columns], 6 bytes per element."""
    state.copy_(rounding.round_stochastically(mean, *noise))


def scalar_names(rule: type[UpdateRule]) -> list[str]:
    """Names of UpdateRule.scalars, in their order."""
    return list(rule.model_validate({}).scalars(1))


@functools.cache
def compiled(kernel: Kernel) -> Kernel:
    """A kernel, compiled at its first call for tensors of any size.

    On a GPU rows and columns are dimensions of the launch: else every element's index would be divided by the width to find
    its row.
    """
    return torch.compile(kernel, dynamic=True, fullgraph=True, options={"triton.prefer_nd_tiling": True})


@functools.cache
def compiled_for(make: Callable[[type[UpdateRule]], Kernel], rule: type[UpdateRule]) -> Kernel:
    """`update_kernel`, `fold_kernel` or `move_kernel` of a rule, compiled."""
    return compiled(make(rule))
