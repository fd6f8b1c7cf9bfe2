"""RMS and gradient norm of whole tensors from fragments (over ranks: test_step.py)."""

import math

import pytest
import torch

from model.parallel.mesh import Mesh, make_mesh
from model.parameters import ParameterSpec
from tests.ranks import run_ranks
from trainer.optimizers.fragments import fragment_of
from trainer.optimizers.norms import _squares, _total, at_least_float32, measure, sum_of_squares
from trainer.optimizers.rule import Statistic


def test_rms_rms_per_row_and_gradient_norm_are_those_of_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    specs = {"w": ParameterSpec("matrix", (3, 4), None), "e": ParameterSpec("embedding", (5, 2), None)}
    full = {name: torch.randn(spec.shape, generator=generator, dtype=torch.float64) for name, spec in specs.items()}
    fragments = [
        fragment_of(name, spec, Mesh(), 0, full[name].view(-1), full[name].view(-1) * 2) for name, spec in specs.items()
    ]
    whole, rows, gradient = Statistic("values", "matrix"), Statistic("values", "row"), Statistic("gradient", "row")
    norms = measure(fragments, Mesh(), {("w", whole): 1, ("e", rows): 5, ("w", gradient): 3}, partitioned=False)
    assert norms.rms["w", whole] == pytest.approx(math.sqrt((full["w"] ** 2).mean()), rel=1e-12)
    torch.testing.assert_close(norms.rms["e", rows], (full["e"] ** 2).mean(1).sqrt(), rtol=1e-12, atol=0)
    torch.testing.assert_close(norms.rms["w", gradient], 2 * (full["w"] ** 2).mean(1).sqrt(), rtol=1e-12, atol=0)
    halved = norms.with_scaled_gradients(0.5)
    torch.testing.assert_close(halved.rms["w", gradient], (full["w"] ** 2).mean(1).sqrt(), rtol=1e-12, atol=0)
    assert halved.rms["w", whole] == norms.rms["w", whole]
    both = torch.cat([2 * values.view(-1) for values in full.values()])
    torch.testing.assert_close(norms.gradient_norm, both.norm(), rtol=1e-12, atol=0)
    for fragment in fragments:
        fragment.gradient = None
    folded = measure(fragments, Mesh(), {}, partitioned=False, gradient_square=9.0)
    assert folded.gradient_norm == 3.0 and not folded.rms


def test_squares_that_overflow_float32_are_infinite_and_bfloat16_is_summed_wide() -> None:
    assert math.isinf(sum_of_squares(torch.tensor([2.0**64])))
    assert sum_of_squares(torch.full((1000,), 1.0, dtype=torch.bfloat16)) == 1000
    assert at_least_float32(torch.ones(1, dtype=torch.bfloat16)).dtype == torch.float32
    assert at_least_float32(double := torch.ones(1, dtype=torch.float64)) is double


@pytest.mark.parametrize("poison", [1.0, math.inf, math.nan])
def test_squares_of_all_tensors_at_once_are_those_of_each(poison: float) -> None:
    """The way of a GPU, here on tensors of a CPU: with parts that are empty, and numbers that are not finite."""
    flats = [torch.randn(length, generator=torch.Generator().manual_seed(length)) for length in (1000, 0, 7, 300)]
    flats[2][3] = poison
    weighted = list(zip(flats, [1.0, 0.5, 0.25, 0.125], strict=True))
    want, got = (_squares(weighted, torch.device(kind)) for kind in ("cpu", "cuda"))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0, equal_nan=True)
    torch.testing.assert_close(_total(got), got.sum(), rtol=1e-15, atol=0, equal_nan=True)


def halves(rank: int, world_size: int) -> list[float]:
    """Each rank has one of two parameters; the sums are packed by name, so both learn both."""
    mesh = make_mesh(1, torch.device("cpu"))
    name = ["b", "a"][rank]
    own = fragment_of(name, ParameterSpec("matrix", (2, 2), None), mesh, 0, torch.full((4,), 2.0 + rank))
    whole = Statistic("values", "matrix")
    measured = measure([own], mesh, {("a", whole): 1, ("b", whole): 1}, partitioned=True)
    return [measured.rms["a", whole], measured.rms["b", whole]]


def test_ranks_may_hold_different_parameters() -> None:
    for found in run_ranks(halves, 2):
        assert found == pytest.approx([3.0, 2.0])
