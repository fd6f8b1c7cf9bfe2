"""Replicas that differ by one bit are found and named, on every rank alike."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from model.parallel.mesh import Mesh, make_mesh
from model.parameters import ParameterSpec, set_spec
from tests.ranks import run_ranks
from trainer.monitoring.replicas import checksum, replica_divergence


@settings(deadline=None)
@given(
    values=st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=40),
    place=st.integers(0, 39),
    bit=st.integers(0, 31),
)
def test_every_flipped_bit_changes_the_checksum(values: list[float], place: int, bit: int):
    tensor = torch.tensor(values, dtype=torch.float32)
    flipped = tensor.clone()
    flipped.view(torch.int32)[place % len(values)] ^= torch.tensor(1 << bit, dtype=torch.int64).to(torch.int32)
    assert checksum(tensor) != checksum(flipped)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_permutation_changes_the_checksum(dtype: torch.dtype):
    tensor = torch.arange(10, dtype=dtype)
    swapped = tensor.clone()
    swapped[[2, 7]] = tensor[[7, 2]]
    assert checksum(tensor) == checksum(tensor.clone())
    assert checksum(tensor) != checksum(swapped)


class _Two(nn.Module):
    def __init__(self, tensor_rank: int):
        super().__init__()
        self.norm = nn.Parameter(torch.ones(8))
        self.up = nn.Parameter(torch.full((4, 2), float(tensor_rank)))  # split: tensor ranks differ by right
        set_spec(self.norm, ParameterSpec("gain", (8,), None))
        set_spec(self.up, ParameterSpec("matrix", (8, 2), 0))


def _check(rank: int, world_size: int, tensor_size: int, cases: list[list[tuple[int, str]]]) -> list[str | None]:
    mesh = make_mesh(tensor_size, torch.device("cpu"))
    answers = []
    for faulty in cases:
        model = _Two(rank % tensor_size)
        with torch.no_grad():
            for _, name in (case for case in faulty if case[0] == rank):
                getattr(model, name).view(torch.int32).view(-1)[3] ^= 1
        answers.append(replica_divergence(model, mesh))
    return answers


@pytest.mark.parametrize(
    ("world_size", "tensor_size", "cases"),
    [
        (
            4,
            2,
            {
                (): None,
                ((3, "up"),): "replicas of up are no longer equal: rank 3 differs",
                ((2, "norm"),): "replicas of norm are no longer equal: rank 2 differs",
                ((1, "norm"), (2, "up")): "replicas of norm are no longer equal: rank 1 differs from the others (1 more",
            },
        ),
        (2, 2, {((1, "norm"),): "replicas of norm are no longer equal: rank 1 differs", ((1, "up"),): None}),
        (
            3,
            1,
            {
                ((0, "norm"), (2, "norm")): "replicas of norm are no longer equal: rank 1 differs",
                ((0, "up"),): "replicas of up are no longer equal: rank 0 differs",
            },
        ),
    ],
)
def test_every_rank_names_the_same_parameter_and_rank(world_size: int, tensor_size: int, cases: dict):
    answers = run_ranks(_check, world_size, tensor_size, [list(faulty) for faulty in cases])
    assert all(answer == answers[0] for answer in answers)
    for said, wanted in zip(answers[0], cases.values(), strict=True):
        assert said is None if wanted is None else said.startswith(wanted) and "checkpoint" in said


def test_one_rank_has_no_replicas():
    assert replica_divergence(_Two(0), Mesh()) is None
