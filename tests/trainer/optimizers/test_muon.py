"""Muon against torch.optim.Muon, and its iteration against the singular value decomposition."""

from typing import Any

import pytest
import torch
from torch import Tensor

from model.parallel.mesh import Mesh
from model.parameters import ParameterSpec
from tests.orthogonal import by_singular_values, polynomials
from tests.trainer.rules import optimizer
from trainer.optimizers.fragments import Fragment, fragment_of
from trainer.optimizers.muon import CLASSICAL, Muon, orthogonalized
from trainer.optimizers.rates import UpdateStep
from trainer.optimizers.step import Optimizer

SHAPES = [(64, 256), (256, 64), (64, 64), (7, 130), (1, 9), (5, 1)]
KINDS = [("quintic", 5), ("polar-express", 5), ("polar-express", 9), ("classical", 12)]


def matrices(shape: tuple[int, ...], count: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


def rule(kind: str, steps: int, **values: Any) -> Muon:
    return Muon.model_validate({"newton_schulz": kind, "newton_schulz_steps": steps, **values})


def cosine(one: Tensor, other: Tensor) -> float:
    return torch.nn.functional.cosine_similarity(one.double().flatten(), other.double().flatten(), dim=0).item()


@pytest.mark.parametrize("shape", SHAPES)
def test_classical_coefficients_converge_to_the_orthogonal_factor(shape: tuple[int, int]) -> None:
    given = matrices(shape)
    left, _, right = torch.linalg.svd(given, full_matrices=False)
    torch.testing.assert_close(orthogonalized(given.clone(), [CLASSICAL] * 30), left @ right, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("kind", "steps"), KINDS)
def test_the_iteration_is_the_polynomial_of_the_singular_values(shape: tuple[int, int], kind: str, steps: int) -> None:
    given = matrices(shape)
    want = torch.stack([by_singular_values(matrix, polynomials(kind, steps)) for matrix in given])
    torch.testing.assert_close(rule(kind, steps).whole_directions(given.clone()), want, rtol=0, atol=1e-6)  # known to 8 digits
    narrow = rule(kind, steps).whole_directions(given.bfloat16())
    assert narrow.dtype == torch.bfloat16
    assert min(map(cosine, narrow, want)) > (0.999 if min(shape) >= 64 else 0.99)  # few singular values, none of them near 1


def test_singular_values_are_near_one() -> None:
    """Of a wide Gaussian matrix; the smallest of a square one may be near zero, and are not lifted so far."""
    for kind, steps, least, most in (
        ("quintic", 5, 0.65, 1.2),
        ("polar-express", 5, 0.8, 1.2),
        ("polar-express", 8, 0.98, 1.02),
    ):
        found = torch.linalg.svdvals(rule(kind, steps).whole_directions(matrices((64, 256))))
        assert least < found.min() and found.max() < most, (kind, found.min(), found.max())


def test_a_matrix_of_zeros_stays_zero() -> None:
    assert not orthogonalized(torch.zeros(1, 4, 6), [CLASSICAL] * 5).any()


def test_the_scale_gives_an_update_the_rms_of_adamw() -> None:
    for shape in ((64, 256), (256, 64)):
        exact = rule("classical", 30)
        direction = exact.whole_directions(matrices(shape)) * exact.whole_scale(*shape)
        assert direction.square().mean().sqrt().item() == pytest.approx(0.2, rel=1e-9)
    scales = [rule("quintic", 5, scale=kind).whole_scale(32, 8) for kind in ("original", "mup", "none")]
    assert scales == [2.0, 2.0, 1.0]
    assert [rule("quintic", 5, scale=kind).whole_scale(8, 32) for kind in ("original", "mup")] == [1.0, 0.5]


def one(values: Tensor) -> Fragment:
    return fragment_of("w", ParameterSpec("matrix", tuple(values.shape), None), Mesh(), 0, values.clone().view(-1))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(("scale", "theirs"), [("original", "original"), ("match-rms-adamw", "match_rms_adamw")])
def test_steps_are_those_of_torch(shape: tuple[int, int], nesterov: bool, scale: str, theirs: str) -> None:
    start = matrices(shape, 1, torch.float32)[0]
    parameter, fragment = torch.nn.Parameter(start.clone()), one(start)
    torchs = torch.optim.Muon(
        [parameter], lr=0.02, weight_decay=0.1, momentum=0.9, nesterov=nesterov, adjust_lr_fn=theirs
    )  # fmt: skip
    settings = optimizer("muon", learning_rate=0.02, beta=0.9, nesterov=nesterov, scale=scale, max_grad_norm=0.0)
    ours = Optimizer(settings, [fragment], Mesh(), {"w": 0.1}, partitioned=False)
    generator = torch.Generator().manual_seed(1)
    for number in range(1, 4):
        parameter.grad = torch.randn(shape, generator=generator)
        fragment.gradient = parameter.grad.clone().view(-1)
        torchs.step()
        ours.update(UpdateStep(number, 0.02))
    moved = (parameter - start).norm()
    assert (fragment.values.view(shape) - parameter).norm() < 1e-4 * moved  # a rounding of bfloat16 may fall the other way


@pytest.mark.parametrize("count", [1, 3, 8])
def test_micro_batches_in_the_momentum_are_one_step_on_their_mean(count: int) -> None:
    folded, whole = (torch.zeros(12, 20, dtype=torch.float64) for _ in range(2))
    generator, plain = torch.Generator().manual_seed(0), rule("quintic", 5, nesterov=False)
    for number in range(1, 6):
        gradients = torch.randn(count, 12, 20, generator=generator, dtype=torch.float64)
        for index, gradient in enumerate(gradients):
            plain.accumulate({"momentum": folded}, gradient / count, plain.scalars(number, decays=index == 0))
        plain.accumulate({"momentum": whole}, gradients.mean(0), plain.scalars(number))
    torch.testing.assert_close(folded, whole, rtol=0, atol=1e-15)
    assert not plain.why_not_folded and rule("quintic", 5).why_not_folded


def test_flops_are_those_of_its_products() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    for shape in ((24, 64), (64, 24)):
        with FlopCounterMode(display=False) as counter:
            rule("quintic", 5).whole_directions(matrices(shape, 1))
        assert counter.get_total_flops() == rule("quintic", 5).whole_flops(*shape)


def test_a_rate_of_another_scale_is_remarked() -> None:
    said = {
        scale: [rate for rate in (1e-3, 5e-3, 2e-2) if Muon(learning_rate=rate, scale=scale).remarks("optimizer.muon")]
        for scale in ("match-rms-adamw", "original", "mup", "none")
    }
    assert said == {"match-rms-adamw": [2e-2], "original": [1e-3], "mup": [1e-3], "none": [1e-3]}
