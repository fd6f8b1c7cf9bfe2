"""Replicas that differ by one bit are found and named, on every rank alike."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from model.config import ModelConfig
from model.parallel.layers import Embedding
from model.parallel.mesh import Mesh, make_mesh
from model.parameters import ParameterSpec, set_spec, set_stack
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


class _TiedStage(nn.Module):
    """What one of three stages has of a network with a tied embedding."""

    def __init__(self, stage: int):
        super().__init__()
        self.config = ModelConfig(tie_word_embeddings=True)
        self.norm = nn.Parameter(torch.full((8,), float(stage)))
        set_spec(self.norm, ParameterSpec("gain", (8,), None))
        if stage != 1:
            self.model = nn.Module()
            self.model.embed_tokens = Embedding(6, 4, ParameterSpec("embedding", (6, 4), None), torch.float32)
            nn.init.ones_(self.model.embed_tokens.weight)


def _check_ends(rank: int, world_size: int, faulty: list[int]) -> list[str | None]:
    mesh, answers = make_mesh(1, torch.device("cpu"), pipeline_parallel_size=3), []
    for at in (-1, *faulty):
        model = _TiedStage(mesh.pipeline.rank)
        if rank == at:
            model.model.embed_tokens.weight.data[2, 1] += 1
        answers.append(replica_divergence(model, mesh))
    return answers


def test_the_two_copies_of_a_tied_embedding_are_compared():
    """Three stages: rank 0 has the first and rank 2 the last; names differ between ranks, and norms do by right."""
    for answers in run_ranks(_check_ends, 3, [0, 2]):
        assert answers[0] is None
        for said in answers[1:]:
            assert said is not None and said.startswith("replicas of model.embed_tokens.weight are no longer equal")


class _Experts(nn.Module):
    """A gain that all ranks share, and two experts of this rank."""

    def __init__(self, mesh: Mesh):
        super().__init__()
        own = range(2 * mesh.experts.rank, 2 * mesh.experts.rank + 2)
        self.norm = nn.Parameter(torch.ones(8))
        self.up = nn.Parameter(torch.arange(own.start, own.stop)[:, None, None].float().expand(2, 3, 4).contiguous())
        set_spec(self.norm, ParameterSpec("gain", (8,), None))
        set_stack(self.up, ParameterSpec("expert", (3, 4), None), own)


def _check_experts(rank: int, world_size: int, cases: list[list[tuple[int, str]]]) -> list[str | None]:
    mesh, answers = make_mesh(1, torch.device("cpu"), expert_parallel_size=2), []
    for faulty in cases:
        model = _Experts(mesh)
        with torch.no_grad():
            for _, name in (case for case in faulty if case[0] == rank):
                getattr(model, name).view(torch.int32).view(-1)[3] ^= 1
        answers.append(replica_divergence(model, mesh))
    return answers


def test_experts_are_compared_between_the_ranks_that_have_the_same_ones():
    cases = [[], [(3, "up")], [(0, "norm")], [(0, "up"), (2, "up")]]
    answers = run_ranks(_check_experts, 4, cases)
    assert all(answer == answers[0] for answer in answers)
    fine, of_expert, of_gain, both = answers[0]
    assert fine is None and both is None  # the same bit on both ranks that hold these experts
    assert of_expert is not None and "up (experts 2 to 3)" in of_expert and "rank 3 differs" in of_expert
    assert of_gain is not None and "norm" in of_gain and "rank 0 differs" in of_gain
