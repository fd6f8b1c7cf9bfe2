"""The mesh: coordinates of ranks, sums over its groups, and worlds that it cannot split."""

import pytest
import torch

from model.parallel.layers import Kit
from model.parallel.mesh import Mesh, make_kit, make_mesh
from tests.ranks import run_ranks


def test_one_process_is_a_mesh_of_one():
    mesh, x = make_mesh(1, torch.device("cpu")), torch.ones(2)
    assert mesh == Mesh() and mesh.sum(x, mesh.tensor_group) is x and x.tolist() == [1, 1]
    assert type(make_kit(mesh)) is Kit


def coordinates_and_refusal(rank: int, world_size: int) -> tuple[list[tuple[int, ...]], str]:
    """Of two ranks side by side in a data group, then in a tensor group: coordinates, and the sum of ranks over both groups."""
    coordinates = []
    for size in (1, 2):
        mesh = make_mesh(size, torch.device("cpu"))
        sums = [int(mesh.sum(torch.tensor(rank + 1), group)) for group in (mesh.tensor_group, mesh.data_group)]
        coordinates.append((mesh.tensor_parallel_rank, mesh.data_parallel_rank, mesh.data_parallel_size, *sums))
    with pytest.raises(ValueError) as caught:
        make_mesh(3, torch.device("cpu"))
    return coordinates, str(caught.value)


def test_two_ranks_are_a_data_or_a_tensor_group():
    first, second = run_ranks(coordinates_and_refusal, 2)
    assert first[0] == [(0, 0, 2, 1, 3), (0, 0, 1, 3, 1)]
    assert second[0] == [(0, 1, 2, 2, 3), (1, 0, 1, 3, 2)]
    assert first[1].startswith("2 ranks cannot form groups of parallel.tensor_parallel_size = 3")
