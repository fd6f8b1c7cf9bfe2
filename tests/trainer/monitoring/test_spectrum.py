"""Singular values against float64 decompositions of the whole weights, however ranks hold them."""

import functools
import math
from typing import Any

import pytest
import torch

from launch.engine import make_engine
from model.decoder import Decoder
from model.parallel.mesh import make_kit, make_mesh
from model.parallel.pipeline import cut_evenly
from model.positions.config import PositionConfig
from model.sizes import parameter_specs
from tests.launch.planner.test_exchange import ENGINES, made
from tests.ranks import run_ranks
from trainer.monitoring.spectrum import Spectrum, entropy_and_largest, matrix_spectra
from trainer.optimizers.fragments import Fragment, whole_fragments


def test_known_spectra():
    """Equal values: 1; one alone: 0; two equal of four: log 2 / log 4."""
    turned = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))[0]
    for values, entropy in (((3.0,) * 4, 1.0), ((5.0, 0, 0, 0), 0.0), ((2.0, 2.0, 0, 0), 0.5)):
        matrix = turned @ torch.diag(torch.tensor(values)) @ torch.eye(4, 9)
        assert entropy_and_largest(matrix).tolist() == pytest.approx([entropy, max(values)], abs=1e-5)
        assert entropy_and_largest(matrix.T).tolist() == pytest.approx([entropy, max(values)], abs=1e-5)
    assert math.isnan(entropy_and_largest(torch.zeros(3, 4))[0])
    assert entropy_and_largest(torch.full((3, 4), math.nan)).isnan().all()
    assert entropy_and_largest(torch.ones(1, 5)).tolist() == pytest.approx([0.0, 5**0.5])


def _value(name: str, elements: torch.Tensor) -> torch.Tensor:
    """Of each element of a full tensor by its index, of a spectrum far from flat: float64."""
    return torch.sin(elements.double() * 0.37 + len(name)) + 0.2 * torch.cos(elements.double().square() * 0.011)


def _fill(fragment: Fragment) -> None:
    """The values of the full tensor at this fragment's place, from their indices alone."""
    full = _value(fragment.name, torch.arange(math.prod(fragment.shape))).view(fragment.shape)
    for axis, (start, size) in enumerate(zip(fragment.slice_start, fragment.slice_shape, strict=True)):
        full = full.narrow(axis, start, size)
    fragment.values.copy_(full.reshape(-1)[fragment.offset : fragment.offset + fragment.values.numel()])


def _spectra(rank: int, ranks: int, tensor: int) -> dict[str, tuple[dict[str, Spectrum], bool]]:
    mesh, found = make_mesh(tensor, torch.device("cpu")), dict[str, Any]()
    for name, overrides in ENGINES.items():
        config = made(tensor, ranks // tensor, *overrides, "train.precision=fp32")
        engine: Any = make_engine(config, mesh)
        matrices = [fragment for fragment in engine.fragments() if fragment.kind == "matrix"]
        for fragment in matrices:
            _fill(fragment)
        before = [fragment.values.clone() for fragment in matrices]
        spectra = matrix_spectra(engine.fragments(), [f.name for f in matrices], mesh, 60_000)
        same = all(torch.equal(a, fragment.values) for a, fragment in zip(before, matrices, strict=True))
        found[name] = (spectra, same)
        engine.close()
    return found


@functools.cache
def _wanted() -> dict[str, tuple[float, float]]:
    """Entropy and largest singular value of each whole matrix."""
    found = {}
    for name, spec in parameter_specs(made(1, 1).model).items():
        if spec.kind == "matrix":
            s = torch.linalg.svdvals(_value(name, torch.arange(spec.elements)).view(spec.shape))
            p = s**2 / (s**2).sum()
            found[name] = float(torch.special.entr(p).sum() / math.log(min(spec.shape))), float(s[0])
            assert 0.05 < found[name][0] < 0.99
    return found


@pytest.mark.parametrize(("tensor", "data"), [(1, 1), (2, 1), (1, 3), (2, 2)])
def test_every_layout_finds_the_spectra_of_the_whole_matrices(tensor: int, data: int):
    """Of the parts alone they differ: half of a matrix's columns have another entropy."""
    for found in run_ranks(_spectra, tensor * data, tensor):
        for layout, (spectra, same) in found.items():
            assert same and list(spectra) == list(_wanted()), layout
            for name, (entropy, largest) in _wanted().items():
                assert spectra[name].entropy == pytest.approx(entropy, abs=1e-5), (layout, name)
                assert spectra[name].largest == pytest.approx(largest, rel=1e-5), (layout, name)


def _of_stages(rank: int, ranks: int, stages: int) -> dict[str, Spectrum]:
    mesh = make_mesh(1, torch.device("cpu"), pipeline_parallel_size=2)
    config = made(1, 1).model
    kit = make_kit(mesh, stage_bounds=cut_evenly([1.0] * config.num_hidden_layers, stages))
    fragments = whole_fragments(Decoder(config, PositionConfig(), 8, kit).owned_parameters(), mesh)
    for fragment in fragments:
        _fill(fragment)
    return matrix_spectra(fragments, list(_wanted()), mesh, 60_000)


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_stage_knows_the_spectra_of_all_layers(ranks: int):
    """Those of the matrices of other stages too, each counted once over the ranks that have it."""
    for spectra in run_ranks(_of_stages, ranks, 2):
        assert list(spectra) == list(_wanted())
        for name, (entropy, largest) in _wanted().items():
            assert spectra[name].entropy == pytest.approx(entropy, abs=1e-5), name
            assert spectra[name].largest == pytest.approx(largest, rel=1e-5), name
