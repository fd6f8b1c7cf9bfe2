"""Whole matrices from parts that ranks hold: who computes what, what is sent, and that every layout has the same directions."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from model.parallel.mesh import Mesh, make_mesh
from model.parameters import ParameterSpec, local_slice
from tests.ranks import run_ranks
from trainer.optimizers import whole as whole_module
from trainer.optimizers.fragments import Fragment, fragment_of
from trainer.optimizers.muon import Muon
from trainer.optimizers.whole import OwnedMatrix, Piece, WholeMatrices, choose_owners, exchange_rounds, pieces_of

CPU = torch.device("cpu")
SPECS = {
    "columns": ParameterSpec("matrix", (8, 6), 0),
    "rows": ParameterSpec("matrix", (5, 12), 1),
    "everywhere": ParameterSpec("matrix", (7, 9), None),
    "large": ParameterSpec("matrix", (24, 30), 0),
    "small": ParameterSpec("matrix", (2, 2), 0),
    "last": ParameterSpec("matrix", (10, 4), 1),
}


def rule(fragment: Fragment) -> Muon:
    """One of two: in bfloat16, and in float64."""
    return Muon(precision="bf16" if fragment.name in ("rows", "last") else "fp32")


def given(name: str) -> Tensor:
    """What is to be orthogonalised."""
    generator = torch.Generator().manual_seed(len(name))
    return torch.randn(SPECS[name].shape, generator=generator, dtype=torch.float64)


def test_pieces_are_in_order_each_with_its_holders():
    held = [(1, 0, 4), (0, 3, 5), (0, 0, 3), (0, 0, 0), (1, 4, 4), (0, 0, 3)]
    found = pieces_of(enumerate(held))
    assert found == (Piece(0, 0, 3, (2, 5)), Piece(0, 3, 5, (1,)), Piece(1, 0, 4, (0,)), Piece(1, 4, 4, (4,)))


def test_owners_hold_a_part_and_share_the_work():
    replicas = {f"m{index}": (Piece(0, 0, 10, (0, 1, 2, 3)),) for index in range(8)}
    owners = [matrix.owner for matrix in choose_owners(replicas, dict.fromkeys(replicas, 1.0))]
    assert sorted(owners) == [0, 0, 1, 1, 2, 2, 3, 3], "two each"
    cut = {"a": (Piece(0, 0, 9, (0,)), Piece(0, 9, 1, (1,))), "b": (Piece(0, 0, 10, (1,)),), "c": (Piece(0, 0, 10, (0,)),)}
    first, *_ = choose_owners(cut, {"a": 1.0, "b": 3.0, "c": 1.0})
    assert first.owner == 0, "its largest part is there, and less work"
    first, *_ = choose_owners(cut, {"a": 1.0, "b": 1.0, "c": 3.0})
    assert first.owner == 1, "the holder of the largest part has more to do already"
    first, *_ = choose_owners(cut, {"a": 1.0, "b": 1.0, "c": 1.0})
    assert first.owner == 0, "among equals the holder of the largest part"


def test_a_round_has_at_most_so_many_elements_of_each_owner():
    matrices = [OwnedMatrix(f"m{i}", (Piece(0, 0, 6, (0, 1)),), owner=i % 2) for i in range(7)]
    alone = OwnedMatrix("alone", (Piece(0, 0, 6, (1,)),), 1)
    rounds = exchange_rounds([*matrices, alone], 12)
    assert [[matrix.name for matrix in each] for each in rounds] == [["m0", "m1", "m2", "m3"], ["m4", "m5", "m6"]]
    assert [len(each) for each in exchange_rounds(matrices, 1)] == [2, 2, 2, 1]


def fragments_of(mesh: Mesh, borders: list[float]) -> list[Fragment]:
    """This rank's parts; borders are shares of a matrix at which data-parallel ranks begin, replicas without."""
    found = []
    for name, spec in SPECS.items():
        full = given(name)
        for dimension, (length, first) in enumerate(zip(*local_slice(spec, mesh.tensor.size, mesh.tensor.rank), strict=True)):
            full = full.narrow(dimension, first, length)
        flat = full.reshape(-1)
        ends = [round(border * flat.numel()) for border in [*borders, 1.0]] if borders else [0, flat.numel()]
        index = mesh.data.rank if borders else 0
        values = flat[ends[index] : ends[index + 1]].clone()
        found.append(fragment_of(name, spec, mesh, ends[index] if values.numel() else 0, values))
    return found


def directions(
    rank: int, world_size: int, tensor_parallel_size: int, borders: list[float], limit: int
) -> tuple[list[tuple[Any, ...]], int, int, int]:
    """What this rank gets, and the bytes that it sends."""
    sent: list[int] = []

    class Counted(dist.P2POp):
        def __init__(self, op: Any, tensor: Tensor, **where: Any):
            super().__init__(op, tensor, **where)
            if op is dist.isend:
                sent.append(tensor.nbytes)

    whole_module.dist.P2POp = Counted  # type: ignore[misc]
    mesh = make_mesh(tensor_parallel_size, CPU)
    fragments = fragments_of(mesh, borders)
    matrices = WholeMatrices(fragments, rule, mesh, limit)
    found = [
        (fragment.name, fragment.slice_start, fragment.slice_shape, fragment.offset, direction.double().numpy())
        for fragment, direction in matrices.directions(lambda fragment: fragment.values)
    ]
    assert sorted(name for name, *_ in found) == sorted(f.name for f in fragments if f.values.numel())
    sizes = {f.name: 2 if rule(f).precision == "bf16" else 8 for f in fragments}
    wanted = 0
    for matrix in matrices.matrices:
        wanted += sizes[matrix.name] * sum(piece.length for piece, source in matrix.sources() if source == rank)
        if matrix.owner == rank:
            wanted += sizes[matrix.name] * sum(piece.length for piece, _ in matrix.receivers())
    return found, sum(sent), wanted, len(matrices.rounds)


LAYOUTS = [
    (2, 1, [0.0, 0.4], 10**6), (3, 1, [0.0, 0.35, 0.7], 100), (3, 1, [0.0, 0.0, 1.0], 10**6), (2, 2, [], 10**6),
    (4, 2, [0.0, 0.6], 1), (4, 2, [], 60), (4, 1, [], 10**6),
]  # fmt: skip


@pytest.mark.parametrize(("world_size", "tensor_parallel_size", "borders", "limit"), LAYOUTS)
def test_every_layout_has_the_directions_of_one_process(
    world_size: int, tensor_parallel_size: int, borders: list[float], limit: int
):
    one = fragments_of(Mesh(), [])
    alone = WholeMatrices(one, rule, Mesh(), 100)
    want = {f.name: d.double().view(f.shape) for f, d in alone.directions(lambda f: f.values)}
    assert want.keys() == SPECS.keys() and not alone.rounds
    covered = {name: torch.zeros(spec.shape, dtype=torch.bool) for name, spec in SPECS.items()}
    for found, sent, wanted, rounds in run_ranks(directions, world_size, tensor_parallel_size, borders, limit):
        assert sent == wanted
        assert rounds > 1 or limit == 10**6
        for name, start, shape, offset, got in found:
            place = tuple(slice(first, first + length) for first, length in zip(start, shape, strict=True))
            part = slice(offset, offset + got.size)
            torch.testing.assert_close(torch.from_numpy(got), want[name][place].reshape(-1)[part], rtol=1e-2, atol=1e-12)
            flags = covered[name][place].reshape(-1)
            flags[part] = True
            covered[name][place] = flags.view(shape)
    assert all(flags.all() for flags in covered.values())
