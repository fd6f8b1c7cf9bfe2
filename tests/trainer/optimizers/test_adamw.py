"""AdamW's fused step against torch.optim.AdamW, with the verdict on the host and on the device."""

from typing import Any

import pytest
import torch

from trainer.optimizers.adamw import AdamW
from trainer.optimizers.rule import Block, RuleStep, RuleTensors, apply_


def step(number: int, *tensors: torch.Tensor, scale: Any = 1.0, bad: Any = False) -> None:
    values, gradient, momentum, second_moment = tensors
    state = {"momentum": momentum, "second_moment": second_moment}
    AdamW().update_together(RuleTensors([values], [gradient], [state]), RuleStep(number, 1e-2, 0.1, scale, bad))


def test_the_steps_are_those_of_torch() -> None:
    values, gradient = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    momentum, second_moment = torch.zeros(50), torch.zeros(50)
    weight = torch.nn.Parameter(values.clone())
    theirs = torch.optim.AdamW([weight], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, foreach=False)
    for number in range(1, 6):
        weight.grad = gradient * number
        theirs.step()
        step(number, values, gradient * number, momentum, second_moment)
        torch.testing.assert_close(values, weight.detach(), rtol=1e-6, atol=1e-7)


def test_operation_by_operation_it_is_the_kernel() -> None:
    """Where rows have rates of their own, torch's kernel cannot be used."""
    generator = torch.Generator().manual_seed(0)
    values, gradient = torch.randn(2, 50, generator=generator)
    other, states = values.clone(), [{name: torch.zeros(50) for name in AdamW.states} for _ in range(2)]
    for number in range(1, 6):
        step(number, values, gradient * number, *states[0].values())
        block = Block(other, gradient * number, states[1], {})
        apply_(other, AdamW().step(block, AdamW().scalars(number)), 1e-2, 0.1)
    torch.testing.assert_close(other, values, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(states[1], states[0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("bad", [True, torch.tensor(True)])
def test_a_bad_step_decays_both_moments_and_leaves_the_values(bad: Any) -> None:
    values, gradient, momentum, second_moment = torch.rand(4, 20, generator=torch.Generator().manual_seed(0))
    gradient[3] = torch.nan
    before = [x.clone() for x in (values, momentum, second_moment)]
    step(2, values, gradient, momentum, second_moment, scale=torch.tensor(0.0), bad=bad)
    assert torch.equal(values, before[0])
    torch.testing.assert_close(momentum, 0.9 * before[1], rtol=3e-7, atol=0)
    torch.testing.assert_close(second_moment, 0.95 * before[2], rtol=3e-7, atol=0)


def test_a_scale_on_the_device_is_that_of_the_cpu_up_to_rounding() -> None:
    """The kernel divides by 1 / scale. Clipped gradients have any scale, not just a power of two."""
    results = []
    for number in (lambda x: x, lambda x: torch.tensor(x, dtype=torch.float64)):
        values, gradient, momentum, second = torch.randn(4, 999, generator=torch.Generator().manual_seed(0))
        step(2, values, gradient, momentum, second.abs_(), scale=number(0.3))
        results.append((values, momentum, second))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
