"""Tiger against its published rule (Su 2023, kexue.fm/archives/9512, 8634): oracles T1 to T7 with measured tolerances."""

import itertools
from typing import Any

import pytest
import torch

from trainer.optimizers.rule import Block, apply_
from trainer.optimizers.tiger import Tiger

BETA = 0.965


def rms(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item()


def accumulate(momentum: torch.Tensor, gradient: torch.Tensor, first: bool) -> None:
    Tiger().accumulate({"momentum": momentum}, gradient, Tiger().scalars(1, decays=first))


def move(values: torch.Tensor, momentum: torch.Tensor, rate: Any, decay: float) -> None:
    direction = Tiger().direction(Block(values, values, {"momentum": momentum}, {}), Tiger().scalars(1))
    apply_(values, direction, rate, decay)


def step(values: torch.Tensor, momentum: torch.Tensor, kind: str, rate: float = 1e-3, by_row: bool = False) -> None:
    rule = Tiger(embedding_rms="row" if by_row else "matrix")
    eta: Any
    eta, decay = rule.rate_and_decay(kind, rate)
    statistic = rule.relative_to(kind)
    if statistic is not None:
        eta = eta * (values.square().mean(1, keepdim=True).sqrt() if statistic.over == "row" else rms(values))
    move(values, momentum, eta, decay)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("cycle", [1, 2, 3, 4, 8, 16, 64])
def test_accumulation_in_the_momentum_is_a_step_on_the_mean_gradient(cycle: int, dtype: torch.dtype) -> None:
    flips = entries = 0
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        p = torch.randn(32, 48, generator=generator, dtype=dtype) * 0.02
        m = torch.zeros_like(p)
        q, n = p.clone(), m.clone()
        for _ in range(20):
            gradients = torch.randn(cycle, 32, 48, generator=generator, dtype=dtype)
            for index, gradient in enumerate(gradients):
                accumulate(m, gradient / cycle, first=index == 0)
            accumulate(n, gradients.mean(0), first=True)
            assert (m - n).abs().max() <= (1e-12 if dtype == torch.float64 else 1e-4) * rms(n)
            step(p, m, "matrix")
            step(q, n, "matrix")
            differ = m.sign() != n.sign()
            assert dtype == torch.float32 or not differ.any()
            flips, entries = flips + int(differ.sum()), entries + differ.numel()
            q.copy_(torch.where(differ, p, q))
            torch.testing.assert_close(p, q, rtol=0, atol=1e-15 if dtype == torch.float64 else 1e-8)
    assert flips <= 1e-5 * entries + 1


def test_beta_on_every_micro_batch_would_be_seen() -> None:
    m = torch.ones(1, dtype=torch.float64)
    for index in range(4):
        accumulate(m, torch.zeros(1, dtype=torch.float64), first=index == 0)
    assert m.item() == pytest.approx(BETA, rel=1e-15)


def test_published_rates_by_kind() -> None:
    theta = torch.tensor([[3.0, -4.0], [6.0, 8.0]], dtype=torch.float64)
    momentum = torch.tensor([[1e-9, -5.0], [-2.0, 3e-3]], dtype=torch.float64)
    matrix = [[2.994242124957938, -3.994186223258501], [6.005254759747125, 7.993962616460751]]
    for kind, wanted in {
        "gain": [[2.9995, -3.9995], [6.0005, 7.9995]],
        "bias": [[2.9995, -3.9995], [6.0005, 7.9995]],
        "matrix": matrix,
        "embedding": matrix,
    }.items():
        values = theta.clone()
        step(values, momentum, kind)
        torch.testing.assert_close(values, torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-14)
    values = theta.clone()
    step(values, momentum, "embedding", by_row=True)
    wanted_rows = [[2.996358400076889, -3.996323044737830], [6.006646803743154, 7.992363246763185]]
    torch.testing.assert_close(values, torch.tensor(wanted_rows, dtype=torch.float64), rtol=0, atol=1e-14)


def test_the_floor_is_a_share_of_the_initial_deviation_or_the_one_asked_for() -> None:
    assert Tiger().floor(0.002) == 0.002 and Tiger(rms_floor=0.3).floor(0.002) == 0.3


@pytest.mark.parametrize("bad", [None, 0, 1, 2, 3])
def test_beta_acts_once_a_cycle_whatever_happens(bad: int | None) -> None:
    m = torch.full((3,), 1e-3, dtype=torch.float64)
    for index in range(4):
        gradient = torch.full((3,), 0.0 if index == bad else 0.25e-3, dtype=torch.float64)
        accumulate(m, gradient, first=index == 0)
    wanted = 1e-3 if bad is None else 9.9125e-4
    torch.testing.assert_close(m, torch.full_like(m, wanted), rtol=0, atol=1e-15)


@pytest.mark.parametrize("bad", [True, torch.tensor(True), False, torch.tensor(False)])
def test_shrink_goes_towards_the_centre(bad: bool | torch.Tensor) -> None:
    gain, matrix = torch.full((2,), 1.2, dtype=torch.float64), torch.full((2,), 1.2, dtype=torch.float64)
    rule = Tiger(non_finite="shrink")
    rule.recover(gain, 1.0, bad)
    rule.recover(matrix, 0.0, bad)
    wanted = (1.198, 1.188) if bad else (1.2, 1.2)
    torch.testing.assert_close(gain, torch.full_like(gain, wanted[0]), rtol=0, atol=1e-15)
    torch.testing.assert_close(matrix, torch.full_like(matrix, wanted[1]), rtol=0, atol=1e-15)


def test_masters_keep_what_bfloat16_loses() -> None:
    master, momentum = torch.ones(1), torch.ones(1)
    low = torch.ones(1, dtype=torch.bfloat16)
    for _ in range(100):
        step(master, momentum, "gain", 2e-3)
        step(low, momentum.bfloat16(), "gain", 2e-3)
    assert abs(master.item() - 0.9) < 2e-6
    assert master.bfloat16().item() == 0.8984375
    assert low.item() == 1.0


def test_a_float_and_a_tensor_give_the_same_step() -> None:
    generator = torch.Generator().manual_seed(0)
    p, m, g = torch.randn(3, 8, 8, generator=generator)
    results = []
    for number in (float, torch.tensor):
        q, n = p.clone(), m.clone()
        Tiger().accumulate({"momentum": n}, g, {"keep": number(BETA), "take": number(1 - BETA)})
        move(q, n, number(1e-3), 0.01)
        results.append((q, n))
    for one, other in itertools.combinations(results, 2):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


def test_momentum_never_decays_to_zero() -> None:
    """Waiting does not stop a rare row: gradual underflow ends at a fixed point above zero (E3)."""
    m = torch.tensor([1e-3])
    for _ in range(5000):
        accumulate(m, torch.zeros(1), first=True)
    assert 0 < m.item() <= 14 * 2.0**-149
