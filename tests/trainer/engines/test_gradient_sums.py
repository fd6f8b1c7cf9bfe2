"""Sums of gradients in float32, however they are cut and sent, against sums in float64 over micro-batches and ranks."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.parallel.mesh import Axis
from tests.ranks import run_ranks
from trainer.engines.gradient_sums import GradientSums, PartSums, WholeSums

CPU, MICRO_BATCHES = torch.device("cpu"), 150
SIZES = {"a": 7, "b": 40, "c": 13, "d": 5}
STAGES = {"a": 0, "b": 0, "c": 2, "d": 2}
LENGTH = sum(SIZES.values())


def gradient(rank: int, index: int, name: str) -> Tensor:
    """bfloat16: the first micro-batch's is large, and each of the others less than half a last bit of it."""
    generator = torch.Generator().manual_seed(1000 * rank + 10 * index + ord(name))
    drawn = torch.randn(SIZES[name], generator=generator).abs() + 0.5
    return (drawn * (8.0 if index == 0 else 1e-2)).bfloat16()


def wanted(ranks: int, more: bool) -> np.ndarray:
    """Mean over ranks of the sums over micro-batches, float64, and with `more` of another gradient of b."""
    total = {name: np.zeros(size) for name, size in SIZES.items()}
    for rank in range(ranks):
        for name in SIZES:
            for index in range(MICRO_BATCHES):
                total[name] += gradient(rank, index, name).double().numpy()
        if more:
            total["b"] += extra(rank).double().numpy()
    return np.concatenate([total[name] / ranks for name in SIZES])


def extra(rank: int) -> Tensor:
    return torch.linspace(-1, 1 + rank, SIZES["b"])


def in_bfloat16(ranks: int) -> np.ndarray:
    """What sums in the dtype of the gradients would be."""
    found = []
    for name, size in SIZES.items():
        total = torch.zeros(size, dtype=torch.float64)
        for rank in range(ranks):
            own = torch.zeros(size, dtype=torch.bfloat16)
            for index in range(MICRO_BATCHES):
                own += gradient(rank, index, name)
            total += own.double()
        found.append((total / ranks).numpy())
    return np.concatenate(found)


def sums_of(kind: str, parameters: dict[str, nn.Parameter], part: int, axis: Axis, limit: int) -> GradientSums:
    starts = np.cumsum([0, *SIZES.values()])
    positions = {parameter: int(start) for parameter, start in zip(parameters.values(), starts, strict=False)}
    if kind == "whole":
        return WholeSums(positions, part, axis, limit, CPU)
    return PartSums({p: STAGES[name] for name, p in parameters.items()}, positions, part, axis, limit, CPU)


def updates(rank: int, ranks: int, kind: str, part: int, limit: int) -> list[tuple[list[float], bool]]:
    """After each of two updates, the second with a gradient from elsewhere: this rank's part, and whether .grad is free."""
    axis = Axis(ranks, rank, dist.group.WORLD if ranks > 1 else None)
    parameters = {name: nn.Parameter(torch.zeros(size, dtype=torch.bfloat16)) for name, size in SIZES.items()}
    sums, found = sums_of(kind, parameters, part, axis, limit), []
    for update in range(2):
        sums.begin()
        free = True
        for index in range(MICRO_BATCHES):
            for stage in (2, 0):  # the last stage of this rank comes first
                sums.begin_backward(stage)
                own = [name for name in SIZES if STAGES[name] == stage]
                torch.stack([(parameters[n] * gradient(rank, index, n)).float().sum() for n in own]).sum().backward()
                free = free and all(parameter.grad is None for parameter in parameters.values())
        if update:
            sums.add(parameters["b"], extra(rank))
        found.append((sums.mean().tolist(), free))
    sums.close()
    (parameters["a"] * gradient(rank, 0, "a")).sum().backward()
    assert parameters["a"].grad is not None and parameters["b"].grad is None, "after close torch keeps gradients"
    return found


def check(kind: str, ranks: int, part: int, limits: list[int]) -> None:
    for limit in limits:
        by_rank = run_ranks(updates, ranks, kind, part, limit)
        for update in range(2):
            got = np.concatenate([rank[update][0] for rank in by_rank])
            assert len(got) == ranks * part and not got[LENGTH:].any(), "beyond the parameters there is nothing"
            np.testing.assert_allclose(got[:LENGTH], wanted(ranks, bool(update)), rtol=1e-5, atol=1e-5)
            assert all(rank[update][1] for rank in by_rank)


@pytest.mark.parametrize("kind", ["whole", "parts"])
def test_two_ranks_have_float32_means_of_all_micro_batches(kind: str) -> None:
    """Parts that end within a parameter and lie partly beyond all; buckets that divide nothing, down to one element."""
    lost = np.abs(in_bfloat16(2) - wanted(2, False)) / wanted(2, False)
    assert lost.mean() > 0.1, "bfloat16 sums lose the small gradients"
    check(kind, 2, 37, [11])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["whole", "parts"])
def test_any_limit_and_any_cut_gives_the_same(kind: str) -> None:
    check(kind, 2, 33, [1, 2, 3, 64, 10_000])
    check(kind, 3, 22, [1, 7, 48, 10_000])
    check(kind, 3, 40, [5, 10_000])


def test_one_rank_has_all_sums_and_sends_nothing() -> None:
    for got, free in updates(0, 1, "whole", LENGTH, 5)[:1]:
        np.testing.assert_allclose(got, wanted(1, False), rtol=1e-5)
        assert free


def test_a_weight_that_no_backward_reaches_has_a_sum_of_zero() -> None:
    parameters = {name: nn.Parameter(torch.zeros(size)) for name, size in SIZES.items()}
    sums: Any = sums_of("whole", parameters, LENGTH, Axis(), 5)
    for _ in range(2):
        sums.begin()
        (parameters["a"] * 3.0).sum().backward()
        assert sums.mean().tolist() == [3.0] * 7 + [0.0] * (LENGTH - 7)
