"""RMS and gradient norm of whole tensors from fragments (over ranks: test_step.py)."""

import math

import pytest
import torch

from model.parallel.mesh import Mesh
from model.parameters import ParameterSpec
from trainer.optimizers.fragments import fragment_of
from trainer.optimizers.norms import _squares, _total, at_least_float32, sum_of_squares, tensor_norms


def test_rms_rms_per_row_and_gradient_norm_are_those_of_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    specs = {"w": ParameterSpec("matrix", (3, 4), None), "e": ParameterSpec("embedding", (5, 2), None)}
    full = {name: torch.randn(spec.shape, generator=generator, dtype=torch.float64) for name, spec in specs.items()}
    fragments = [
        fragment_of(name, spec, Mesh(), 0, full[name].view(-1), full[name].view(-1) * 2) for name, spec in specs.items()
    ]
    norms = tensor_norms(fragments, Mesh(), rms_of={"w"}, row_rms_of={"e"}, partitioned=False)
    assert norms.rms == {"w": pytest.approx(math.sqrt((full["w"] ** 2).mean()), rel=1e-12)}
    torch.testing.assert_close(norms.row_rms, {"e": (full["e"] ** 2).mean(1).sqrt()}, rtol=1e-12, atol=0)
    both = torch.cat([2 * values.view(-1) for values in full.values()])
    torch.testing.assert_close(norms.gradient_norm, both.norm(), rtol=1e-12, atol=0)
    for fragment in fragments:
        fragment.gradient = None
    folded = tensor_norms(fragments, Mesh(), rms_of=set(), row_rms_of=set(), partitioned=False, gradient_square=9.0)
    assert folded.gradient_norm == 3.0 and not folded.rms and not folded.row_rms


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
