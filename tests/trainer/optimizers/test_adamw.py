"""AdamW's fused step against torch.optim.AdamW, with the verdict on the host and on the device."""

from typing import Any

import pytest
import torch

from trainer.optimizers import adamw
from trainer.optimizers.adamw import AdamWStep


def step(number: int) -> AdamWStep:
    return AdamWStep(number, rate=1e-2, betas=(0.9, 0.95), decay=0.1, eps=1e-8)


def test_the_steps_are_those_of_torch() -> None:
    values, gradient = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    momentum, second_moment = torch.zeros(50), torch.zeros(50)
    weight = torch.nn.Parameter(values.clone())
    theirs = torch.optim.AdamW([weight], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, foreach=False)
    for number in range(1, 6):
        weight.grad = gradient * number
        theirs.step()
        adamw.adamw_([values], [gradient * number], [momentum], [second_moment], step(number))
        torch.testing.assert_close(values, weight.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bad", [True, torch.tensor(True)])
def test_a_bad_step_decays_both_moments_and_leaves_the_values(bad: Any) -> None:
    values, gradient, momentum, second_moment = torch.rand(4, 20, generator=torch.Generator().manual_seed(0))
    gradient[3] = torch.nan
    before = [x.clone() for x in (values, momentum, second_moment)]
    adamw.adamw_([values], [gradient], [momentum], [second_moment], step(2), scale=torch.tensor(0.0), bad=bad)
    assert torch.equal(values, before[0])
    torch.testing.assert_close(momentum, 0.9 * before[1], rtol=3e-7, atol=0)
    torch.testing.assert_close(second_moment, 0.95 * before[2], rtol=3e-7, atol=0)


def test_a_scale_on_the_device_is_that_of_the_cpu_up_to_rounding() -> None:
    """The kernel divides by 1 / scale. Clipped gradients have any scale, not just a power of two."""
    results = []
    for number in (lambda x: x, lambda x: torch.tensor(x, dtype=torch.float64)):
        values, gradient, momentum, second = torch.randn(4, 999, generator=torch.Generator().manual_seed(0))
        adamw.adamw_([values], [gradient], [momentum], [second.abs_()], step(2), scale=number(0.3))
        results.append((values, momentum, second))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
