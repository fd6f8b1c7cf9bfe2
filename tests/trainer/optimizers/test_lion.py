"""Lion against its paper's rule, the lion-pytorch package and its closed form under a constant sign (T8, T9)."""

import pytest
import torch

from trainer.optimizers import lion
from trainer.optimizers.rule import Block, apply_

Lion = pytest.importorskip("lion_pytorch").Lion


def step(
    p: torch.Tensor, m: torch.Tensor, gradient: torch.Tensor, betas: tuple[float, float], rate: float, decay: float
) -> None:  # fmt: skip
    rule = lion.Lion(betas=betas)
    apply_(p, rule.step(Block(p, gradient, {"momentum": m}, {}), rule.scalars(1)), rate, decay)


def test_sign_before_momentum() -> None:
    p, m = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    seen = []
    for gradient in (1.0, -0.5):
        step(p, m, torch.tensor([gradient], dtype=torch.float64), (0.9, 0.99), 0.1, 0.0)
        seen.append((p.item(), m.item()))
    assert seen[0] == pytest.approx((0.9, 0.01), abs=1e-12)
    assert seen[1] == pytest.approx((1.0, 0.0049), abs=1e-12)


def test_closed_form_under_a_constant_sign() -> None:
    p, m = torch.full((1,), 0.02, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    gradient = torch.full((1,), -1.0, dtype=torch.float64)
    for _ in range(10_000):
        step(p, m, gradient, (0.95, 0.98), 1e-4, 0.01)
    assert p.item() == pytest.approx(1 / 0.01 + (0.02 - 1 / 0.01) * (1 - 1e-6) ** 10_000, abs=1e-9)
    assert p.item() == pytest.approx(1.0148181167, abs=1e-9)


def test_as_lion_pytorch() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(64, 32, generator=generator, dtype=torch.float64)
    theirs = torch.nn.Parameter(p.clone())
    package = Lion([theirs], lr=1e-3, betas=(0.95, 0.98), weight_decay=0.1)
    m = torch.zeros_like(p)
    for _ in range(50):
        gradient = torch.randn(64, 32, generator=generator, dtype=torch.float64)
        step(p, m, gradient, (0.95, 0.98), 1e-3, 0.1)
        theirs.grad = gradient
        package.step()
    torch.testing.assert_close(p, theirs.detach(), rtol=0, atol=1e-13)
    torch.testing.assert_close(m, package.state[theirs]["exp_avg"], rtol=0, atol=1e-13)


def test_a_bad_gradient_decays_the_momentum_and_moves_nothing() -> None:
    p, m = torch.ones(3), torch.ones(3)
    rule = lion.Lion()
    rule.accumulate({"momentum": m}, torch.zeros(3), rule.scalars(1))
    assert torch.equal(p, torch.ones(3)) and torch.equal(m, torch.full((3,), 0.98))
