"""The one-pass kernels against the same updates operation by operation, in plain Python (their compiled form: test_fold.py)."""

from collections.abc import Mapping
from typing import ClassVar

import pytest
import torch

from trainer.optimizers import rounding
from trainer.optimizers.adamw import AdamW
from trainer.optimizers.fused import (
    GRADIENT_LIMIT,
    compiled,
    fold_kernel,
    move_kernel,
    scalar_table,
    store_mean,
    to_device,
    update_kernel,
)
from trainer.optimizers.lion import Lion
from trainer.optimizers.rule import Block, Granularity, UpdateRule, apply_
from trainer.optimizers.tiger import Tiger

CPU = torch.device("cpu")


def one_pass_against_two(compiles: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    rules: list[UpdateRule] = [Tiger(), Lion(), AdamW()]
    for rule in rules:
        kernel = update_kernel(type(rule))
        for length, scale, bad in [(1000, 1.0, False), (64, 0.3, False), (777, 0.0, True)]:
            values, gradient, *states = torch.randn(2 + len(rule.states), length, generator=generator)
            states[-1].abs_()
            gradient[0] = torch.nan if bad else 1.0
            mine, theirs = [[x.clone() for x in (values, *states)] for _ in range(2)]
            table = scalar_table([rule], 3, (torch.tensor([1e-3]), [0.1]), scale, bad)
            (compiled(kernel) if compiles else kernel)(mine[0], gradient, mine[1:], table[0])
            state, usable = dict(zip(rule.states, theirs[1:], strict=True)), torch.zeros(length) if bad else gradient * scale
            direction = rule.step(Block(theirs[0], usable, state, {}), rule.scalars(3))
            if not bad:
                apply_(theirs[0], direction, 1e-3, 0.1)
            torch.testing.assert_close(mine, theirs, rtol=2e-6, atol=1e-7)


def test_one_pass_is_the_rule() -> None:
    one_pass_against_two(compiles=False)


@pytest.mark.slow
def test_the_compiled_pass_is_the_rule() -> None:
    one_pass_against_two(compiles=True)


def noise(rows: int, columns: int) -> rounding.SliceNoise:
    return rounding.slice_noise(rounding.noise_key(1, 2), rounding.SliceBounds(0, 0, rows, columns), CPU)


def test_scalars_are_clipping_rates_decays_and_those_of_each_rule() -> None:
    rates = (torch.tensor([0.5, 0.75]), [0.25, 0.0])
    table = scalar_table([Tiger(), Lion()], 1, rates, 2.0, False).tolist()
    assert table[0] == pytest.approx([2.0, 0.5, 0.25, 0.0, 0.965, 0.035, 0.0, 0.0])
    assert table[1] == pytest.approx([2.0, 0.75, 0.0, 0.0, 0.95, 0.05, 0.98, 0.02])
    assert scalar_table([Tiger()], 1, (torch.tensor([0.5]), [0.25]), 0.0, True)[0, 3] == 1.0
    assert to_device([1, 2], CPU, torch.float64).tolist() == [1.0, 2.0]


def test_folding_rounds_the_new_momentum_sums_squares_and_leaves_out_what_is_not_finite() -> None:
    generator = torch.Generator().manual_seed(0)
    momentum = torch.randn(3, 8, generator=generator).bfloat16()
    gradient = torch.randn(3, 8, generator=generator).bfloat16()
    gradient[1, 4], gradient[2, 0] = torch.nan, GRADIENT_LIMIT
    own, squares, wide = noise(3, 8), torch.ones(3, 1), gradient.float()
    expected = torch.empty_like(momentum)
    usable = torch.where(wide.isfinite() & (wide.abs() < GRADIENT_LIMIT), wide, 0.0)
    own.round_(expected, 0.9 * momentum.float() + 0.1 * usable, 0, 0)
    fold_kernel(Tiger)([momentum], gradient, squares, torch.tensor([0.9, 0.1]), [own.bits()])
    assert torch.equal(momentum, expected)
    torch.testing.assert_close(squares[0], 1.0 + wide[0].square().sum(0, keepdim=True))
    assert squares[1].isnan() and squares[2].isinf()


def test_means_and_values_are_rounded_as_slice_noise_rounds_them() -> None:
    generator, own = torch.Generator().manual_seed(1), noise(4, 6)
    mean, momentum, values = torch.randn(3, 4, 6, generator=generator)
    stored, expected = momentum.bfloat16(), momentum.bfloat16()
    own.round_(expected, mean.clone(), 0, 0)
    store_mean(stored, mean, own.bits())
    assert torch.equal(stored, expected)
    weights, rate = values.bfloat16(), torch.tensor([[1e-2], [0.0], [1e-2], [1e-2]])
    own.round_(expected, weights.float() - rate * (momentum.bfloat16().float().sign() + 0.1 * weights.float()), 0, 0)
    before = weights.clone()
    scalars = torch.tensor([0.9, 0.1])
    move_kernel(Tiger)(weights, [momentum.bfloat16()], rate, torch.tensor(0.1), scalars, own.bits())
    assert torch.equal(weights, expected) and torch.equal(weights[1], before[1])


class WithRows(Tiger):
    """Tiger with a state per row, which folding does not touch."""

    states: ClassVar[Mapping[str, Granularity]] = {"row_square": "row", "momentum": "element"}


def test_folding_takes_the_states_of_elements_alone() -> None:
    (momentum, gradient), own = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)).bfloat16(), noise(3, 8)
    both = [momentum.clone(), momentum.clone()]
    for rule, states in zip((Tiger, WithRows), both, strict=True):
        fold_kernel(rule)([states], gradient, torch.zeros(3, 1), torch.tensor([0.9, 0.1]), [own.bits()])
    assert torch.equal(*both) and not torch.equal(both[0], momentum)
