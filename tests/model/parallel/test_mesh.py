"""The mesh: places of ranks on the axes, sums over their groups, and worlds that it cannot split."""

from datetime import timedelta
from typing import Any

import pytest
import torch

from model.parallel.layers import Kit
from model.parallel.mesh import AXES, Axis, Mesh, expert_ranks, make_kit, make_mesh, rank_grid, ranks_along
from tests.ranks import run_ranks

CPU = torch.device("cpu")
JOINED = ("replicas", "partition", "stage", "world", "ends")


def test_one_process_is_a_mesh_of_one():
    mesh, x = make_mesh(1, CPU), torch.ones(2)
    assert mesh == Mesh() and mesh.tensor.sum(x) is x and mesh.world.max(x) is x and x.tolist() == [1, 1]
    assert type(make_kit(mesh)) is Kit


def places_and_refusal(rank: int, world_size: int) -> tuple[list[dict[str, Any]], str]:
    """Of a mesh of data ranks, then of tensor ranks: size and rank on each axis, and sum and maximum of rank + 1 over it."""
    places = []
    for size in (1, 2):
        mesh, place = make_mesh(size, CPU), {}
        for name in (*AXES, "replicas", "partition", "world"):
            axis: Axis = getattr(mesh, name)
            found = [int(reduce(torch.tensor(rank + 1))) for reduce in (axis.sum, axis.max)]
            place[name] = (axis.size, axis.rank, *found)
        places.append(place)
        assert mesh.devices is not None and mesh.devices.mesh_dim_names == AXES
        for name in AXES:  # what torch's mesh says of this rank
            axis, group = getattr(mesh, name), mesh.devices.get_group(name)
            assert (mesh.devices[name].size(), mesh.devices.get_local_rank(name)) == (axis.size, axis.rank)
            assert group.size() == axis.size and (axis.group is group or (axis.group is None and axis.size == 1))
    with pytest.raises(ValueError) as caught:
        make_mesh(3, CPU)
    return places, str(caught.value)


def test_four_ranks_are_data_ranks_or_two_by_two():
    for rank, (places, refusal) in enumerate(run_ranks(places_and_refusal, 4)):
        alone, everyone = (1, 0, rank + 1, rank + 1), (4, rank, 10, 4)
        copies = dict.fromkeys(("data", "replicas", "partition", "world"), everyone)
        assert places[0] == {"pipeline": alone, "context": alone, "tensor": alone, **copies}
        data, tensor = divmod(rank, 2)
        across = (2, data, 2 * tensor + 4, tensor + 3)
        copies = dict.fromkeys(("data", "replicas", "partition"), across)
        neighbours = (2, tensor, 4 * data + 3, 2 * data + 2)
        assert places[1] == {"pipeline": alone, "context": alone, "tensor": neighbours, **copies, "world": everyone}
        assert refusal.startswith("4 ranks cannot form groups of parallel.tensor_parallel_size = 3")


def groups_of_meshes(rank: int, world_size: int) -> list[tuple[int, float]]:
    """Size and timeout (s) of the groups of a mesh; those of a second one are others."""
    meshes = [make_mesh(2, CPU, timeout_seconds=431) for _ in range(2)]
    groups = [mesh.devices.get_group(name) for mesh in meshes for name in AXES]  # type: ignore[union-attr]
    assert len({group.group_name for group in groups}) == 6, "pipeline and context share one, of this rank"
    return [(group.size(), group._get_backend(CPU).options._timeout / timedelta(seconds=1)) for group in groups[:4]]


def test_every_group_has_the_timeout_that_was_asked_for():
    assert run_ranks(groups_of_meshes, 4) == [[(1, 431.0), (2, 431.0), (1, 431.0), (2, 431.0)]] * 4


def test_context_ranks_are_replicas_that_share_a_batch():
    """Tensor x context x data x pipeline, tensor fastest."""
    grid = torch.arange(16).view(2, 2, 2, 2)
    assert [ranks_along([name], 6, grid) for name in AXES] == [[6, 14], [2, 6], [4, 6], [6, 7]]
    assert ranks_along(["data", "context"], 6, grid) == [0, 2, 4, 6]
    assert rank_grid(6, 2).tolist() == [[[[0, 1]], [[2, 3]], [[4, 5]]]]
    assert rank_grid(8, 2, 2).tolist() == [[[[0, 1], [2, 3]], [[4, 5], [6, 7]]]]
    with pytest.raises(ValueError, match=r"tensor_parallel_size = 2 x parallel.context_parallel_size = 2; start a multiple of"):
        rank_grid(6, 2, 2)


def places_of_shared_sequences(rank: int, world_size: int) -> dict[str, tuple[int, int, int]]:
    """Size, rank and the sum of rank + 1 on every axis."""
    mesh = make_mesh(1, CPU, context_parallel_size=2)
    axes: dict[str, Axis] = {name: getattr(mesh, name) for name in (*AXES, "replicas", "partition", "world")}
    kit = make_kit(mesh, context_exchange="heads").context
    assert (kit.size, kit.rank, kit.group, kit.exchange) == (2, rank % 2, mesh.context.group, "heads")
    return {name: (axis.size, axis.rank, int(axis.sum(torch.tensor(rank + 1)))) for name, axis in axes.items()}


def test_four_ranks_are_two_by_two_that_share_sequences():
    for rank, place in enumerate(run_ranks(places_of_shared_sequences, 4)):
        data, context = divmod(rank, 2)
        everyone = dict.fromkeys(("replicas", "partition", "world"), (4, rank, 10))
        alone = dict.fromkeys(("pipeline", "tensor"), (1, 0, rank + 1))
        assert place == {
            **everyone, **alone, "data": (2, data, 2 * context + 4), "context": (2, context, 4 * data + 3),
        }  # fmt: skip


def places_of_stages(rank: int, world_size: int) -> dict[str, tuple[int, int, int]]:
    """Size, rank and the sum of rank + 1 on every axis of a mesh of two stages, of four ranks each if there are eight."""
    mesh = make_mesh(1, CPU, context_parallel_size=2 if world_size == 8 else 1, pipeline_parallel_size=2)
    axes: dict[str, Axis] = {name: getattr(mesh, name) for name in (*AXES, *JOINED)}
    pipeline = make_kit(mesh, stage_bounds=(0, 1, 3)).pipeline
    assert (pipeline.size, pipeline.rank, pipeline.group) == (2, mesh.pipeline.rank, mesh.pipeline.group)
    assert pipeline.bounds == (0, 1, 3) and pipeline.group is not None
    return {name: (axis.size, axis.rank, int(axis.sum(torch.tensor(rank + 1)))) for name, axis in axes.items()}


def test_four_ranks_are_two_stages_of_two_data_ranks():
    """Stages are furthest apart: ranks 0 and 1 have the first, 2 and 3 the second."""
    for rank, place in enumerate(run_ranks(places_of_stages, 4)):
        stage, data = divmod(rank, 2)
        across = (2, stage, 2 * data + 4)
        alike = dict.fromkeys(("data", "replicas", "partition", "stage"), (2, data, 4 * stage + 3))
        alone = dict.fromkeys(("context", "tensor"), (1, 0, rank + 1))
        assert place == {**alike, **alone, "pipeline": across, "ends": across, "world": (4, rank, 10)}


@pytest.mark.slow
def test_eight_ranks_are_two_stages_of_two_data_by_two_context_ranks():
    for rank, place in enumerate(run_ranks(places_of_stages, 8)):
        stage, data, context = rank // 4, rank // 2 % 2, rank % 2
        across = (2, stage, 2 * (rank % 4) + 6)
        alike = dict.fromkeys(("replicas", "partition", "stage"), (4, rank % 4, 16 * stage + 10))
        assert place == {
            **alike, "pipeline": across, "ends": across, "world": (8, rank, 36), "tensor": (1, 0, rank + 1),
            "data": (2, data, 8 * stage + 2 * context + 4), "context": (2, context, 8 * stage + 4 * data + 3),
        }  # fmt: skip


def ends_of_a_long_pipeline(rank: int, world_size: int) -> tuple[dict[str, tuple[int, int, int]], list[int]]:
    """Size, rank and sum of rank + 1 of the axes `ends` and `stage`, and what the rank with the last stage broadcasts."""
    mesh = make_mesh(1, CPU, pipeline_parallel_size=world_size)
    axes = {"ends": mesh.ends, "stage": mesh.stage}
    last = make_kit(mesh).pipeline.from_last(torch.tensor([rank]))
    return {name: (axis.size, axis.rank, int(axis.sum(torch.tensor(rank + 1)))) for name, axis in axes.items()}, last.tolist()


def test_the_ends_of_a_pipeline_are_its_first_and_last_rank():
    for rank, (axes, last) in enumerate(run_ranks(ends_of_a_long_pipeline, 4)):
        alone = (1, 0, rank + 1)
        assert axes == {"ends": {0: (2, 0, 5), 3: (2, 1, 5)}.get(rank, alone), "stage": alone} and last == [3]


def test_the_places_of_pipeline_ranks():
    assert rank_grid(8, 2, 1, 2).tolist() == [[[[0, 1]], [[2, 3]]], [[[4, 5]], [[6, 7]]]]
    with pytest.raises(ValueError) as caught:
        rank_grid(6, 1, 1, 4)
    assert str(caught.value) == (
        "6 ranks cannot form groups of parallel.tensor_parallel_size = 1 x parallel.pipeline_parallel_size = 4; "
        "start a multiple of 4 ranks"
    )


def sums_of_a_second_mesh(rank: int, world_size: int) -> list[int]:
    """Over the ranks of a stage, of rank + 1, after a mesh of which two ranks alone have a group for the ends."""
    assert make_mesh(1, CPU, timeout_seconds=20, pipeline_parallel_size=4).ends.size == (2 if rank in (0, 3) else 1)
    mesh = make_mesh(1, CPU, timeout_seconds=20, pipeline_parallel_size=2)
    return [int(axis.sum(torch.tensor(rank + 1))) for axis in (mesh.stage, mesh.pipeline)]


def test_ranks_between_the_ends_of_a_pipeline_meet_the_others_in_a_second_mesh():
    """torch names a group after how many its process has: with fewer on some ranks, they would wait for each other."""
    assert run_ranks(sums_of_a_second_mesh, 4) == [[3, 4], [3, 6], [7, 4], [7, 6]]


def test_the_places_of_ranks_that_split_experts():
    replicas = [0, 2, 4, 6, 8, 10, 12, 14]  # every second rank, as with two tensor-parallel ranks
    assert expert_ranks(replicas, 6, 4) == ([0, 2, 4, 6], [6, 14])
    assert expert_ranks(replicas, 10, 2) == ([8, 10], [2, 6, 10, 14])
    assert expert_ranks(replicas, 4, 1) == ([4], replicas)
    assert expert_ranks(replicas, 4, 8) == (replicas, [4])
    with pytest.raises(ValueError) as caught:
        expert_ranks(replicas, 0, 3)
    assert str(caught.value) == (
        "parallel.expert_parallel_size = 3 does not divide the 8 ranks that have the same weights otherwise (data x context "
        "parallel); change one of them"
    )


def sums_over_experts(rank: int, world_size: int) -> list[list[int]]:
    """Over the ranks with different experts, with the same, and with the same dense weights, of 2 ** rank."""
    found = []
    for size in (2, 4, 1):
        mesh = make_mesh(2, CPU, timeout_seconds=20, context_parallel_size=2, expert_parallel_size=size)
        assert make_kit(mesh).experts.own(8) == range(*[8 // size * (mesh.experts.rank + more) for more in (0, 1)])
        axes = (mesh.experts, mesh.expert_replicas, mesh.replicas)
        assert mesh.replicas_of("expert") is mesh.expert_replicas and mesh.replicas_of("matrix") is mesh.replicas
        found.append([int(axis.sum(torch.tensor(2**rank))) for axis in axes])
    return found


def test_ranks_that_split_experts_are_neighbours_among_those_with_the_same_weights():
    """Tensor 2 x context 2 x data 2."""
    results = run_ranks(sums_over_experts, 8)
    even, odd = 0b01010101, 0b10101010
    assert results[0] == [[0b101, 0b10001, even], [even, 1, even], [1, even, even]]
    assert results[7] == [[0b10100000, 0b10001000, odd], [odd, 1 << 7, odd], [1 << 7, odd, odd]]
