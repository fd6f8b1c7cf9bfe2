"""The one-pass kernels against the same updates operation by operation, in plain Python (their compiled form: test_fold.py)."""

from collections.abc import Callable

import pytest
import torch

from trainer.config import OptimizerConfig
from trainer.optimizers import lion, rounding, tiger
from trainer.optimizers.fused import (
    GRADIENT_LIMIT,
    compiled,
    fold_gradient,
    kernel_scalars,
    sign_update,
    store_mean,
    to_device,
    update_values,
)

CPU = torch.device("cpu")


def one_pass_against_two(kernel: Callable[..., None]) -> None:
    generator = torch.Generator().manual_seed(0)
    for name in ("tiger", "lion"):
        settings = OptimizerConfig(name=name, weight_decay=0.1)
        for length, scale, bad in [(1000, 1.0, False), (64, 0.3, False), (777, 0.0, True)]:
            values, momentum, gradient = torch.randn(3, length, generator=generator)
            gradient[0] = torch.nan if bad else 1.0
            mine, theirs = [(values.clone(), momentum.clone()) for _ in range(2)]
            kernel(*mine, gradient, kernel_scalars(settings, torch.tensor([1e-3]), [0.1], scale, bad)[0])
            usable, betas = None if bad else gradient, settings.coefficients
            if name == "lion":
                lion.lion_(*theirs, usable, (betas[0], betas[1]), 1e-3, 0.1, scale)
            else:
                tiger.accumulate_(theirs[1], usable, betas[0], (1 - betas[0]) * scale)
                if not bad:
                    tiger.apply_sign_(*theirs, 1e-3, 0.1)
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


def test_one_pass_is_the_published_rule() -> None:
    one_pass_against_two(sign_update)


@pytest.mark.slow
def test_the_compiled_pass_is_the_published_rule() -> None:
    one_pass_against_two(compiled(sign_update))


def noise(rows: int, columns: int) -> rounding.SliceNoise:
    return rounding.slice_noise(rounding.noise_key(1, 2), rounding.SliceBounds(0, 0, rows, columns), CPU)


def test_kernel_scalars_are_the_coefficients_of_each_rule() -> None:
    tiger_row = kernel_scalars(OptimizerConfig(name="tiger"), torch.tensor([0.5]), [0.25], 2.0, False)[0].tolist()
    assert tiger_row == pytest.approx([0.965, 0.07, 0.965, 0.07, 0.5, 0.25, 0.0])
    lion_row = kernel_scalars(OptimizerConfig(name="lion"), torch.tensor([0.5]), [0.25], 1.0, True)[0].tolist()
    assert lion_row == pytest.approx([0.95, 0.05, 0.98, 0.02, 0.5, 0.25, 1.0])
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
    fold_gradient(momentum, gradient, squares, torch.tensor([0.9, 0.1]), own.a, own.b, own.h)
    assert torch.equal(momentum, expected)
    torch.testing.assert_close(squares[0], 1.0 + wide[0].square().sum(0, keepdim=True))
    assert squares[1].isnan() and squares[2].isinf()


def test_means_and_values_are_rounded_as_slice_noise_rounds_them() -> None:
    generator, own = torch.Generator().manual_seed(1), noise(4, 6)
    mean, momentum, values = torch.randn(3, 4, 6, generator=generator)
    stored, expected = momentum.bfloat16(), momentum.bfloat16()
    own.round_(expected, mean.clone(), 0, 0)
    store_mean(stored, mean, own.a, own.b, own.h)
    assert torch.equal(stored, expected)
    weights, rate = values.bfloat16(), torch.tensor([[1e-2], [0.0], [1e-2], [1e-2]])
    own.round_(expected, weights.float() - rate * (momentum.bfloat16().float().sign() + 0.1 * weights.float()), 0, 0)
    before = weights.clone()
    update_values(weights, momentum.bfloat16(), rate, torch.tensor(0.1), own.a, own.b, own.h)
    assert torch.equal(weights, expected) and torch.equal(weights[1], before[1])
