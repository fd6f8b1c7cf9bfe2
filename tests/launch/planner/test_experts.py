"""Experts in plans, against hand counts."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.collectives import Recorder
from benchmarks.plan_check import _Batch
from launch.config import RunConfig
from launch.engine import make_engine
from launch.load_config import build_config, load_config
from launch.planner.communication import FROM_EXPERTS, TO_EXPERTS, WEIGHTS_OF_COPIES, expert_messages, update_messages
from launch.planner.layouts import make_plan
from launch.planner.memory import can_split_experts, layout_of, memory, state
from launch.planner.time import accelerator, predict
from model.parallel.mesh import make_mesh
from tests.ranks import run_ranks

EXPERT = 3 * 64 * 32


def split(*options: str) -> RunConfig:
    """Two layers with 8 experts each, which 2 of 8 ranks split; 2 micro-batches."""
    sizes = {
        "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "feed_forward": "moe", "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32,
    }  # fmt: skip
    train = {"sequence_length": 64, "micro_batch_size": 1, "global_batch_size": 16}
    values = {"model": sizes, "train": train, "optimizer": {"name": "adamw"}, "parallel": {"expert_parallel_size": 2}}
    return build_config(values, options)


def test_a_rank_has_its_experts_alone():
    both = [split(option) for option in ("parallel.expert_parallel_size=1", "parallel.expert_parallel_size=2")]
    whole, half = (state(config, layout_of(config, 8)) for config in both)
    own = 2 * 4 * EXPERT
    assert whole.weights - half.weights == 2 * own
    assert (whole.masters, whole.states) == (half.masters, half.states)  # among all ranks each is there once
    assert whole.gradients - half.gradients == 6 * 2 * own - 4 * own
    stage_2 = split("parallel.zero_stage=2")
    assert half.gradients > state(stage_2, layout_of(stage_2, 8)).gradients


@pytest.mark.parametrize(("recompute", "passes"), [("none", 2), ("experts", 2), ("selective", 3), ("full", 3)])
def test_copies_travel_there_and_back(recompute: str, passes: int):
    config = split(f"train.recompute={recompute}")
    found = {part.what: part for part in expert_messages(config, layout_of(config, 8))}
    layers_and_batches, copies = 2 * 2, 64 * 3
    for what, times in ((TO_EXPERTS, passes), (FROM_EXPERTS, 2)):
        assert found[what].bytes == times * layers_and_batches * copies * 64 * 2
        assert found[what].bytes_sent == found[what].bytes / 2 and found[what].messages == times * layers_and_batches
    weights = passes * copies * 4 + (passes - 1) * 8 * 8
    assert found[WEIGHTS_OF_COPIES].bytes == layers_and_batches * weights


RECOMPUTATIONS = ("none", "experts", "selective", "full")
TWO_BATCHES = ("train.global_batch_size=4", "parallel.engine=fold", "optimizer.name=tiger")


def _exchanged(rank: int, ranks: int) -> list[tuple[int, int]]:
    """With each recomputation: exchanges of an update on this rank, and the bytes that came."""
    mesh = make_mesh(1, torch.device("cpu"), expert_parallel_size=2)
    found = []
    for recompute in RECOMPUTATIONS:
        config = split(
            f"train.recompute={recompute}", "train.global_batch_size=4", "parallel.engine=fold", "optimizer.name=tiger"
        )
        engine: Any = make_engine(config, mesh)
        generator = torch.Generator().manual_seed(rank)
        with Recorder({}) as recorder:
            engine.accumulate([_Batch(config, generator) for _ in range(2)])
        engine.close()
        sizes = [call.bytes for call in recorder.calls if call.op == "all-to-all"]
        found.append((len(sizes), sum(sizes)))
    return found


@pytest.mark.slow
def test_live_ranks_exchange_as_planned():
    """Messages on each rank, bytes on both together: what is too much on one is missing on the other, however uneven the
    loads."""
    live = run_ranks(_exchanged, 2)
    for recompute, *ranks in zip(RECOMPUTATIONS, *live, strict=True):
        config = split(
            f"train.recompute={recompute}", "train.global_batch_size=4", "parallel.engine=fold", "optimizer.name=tiger"
        )
        planned = expert_messages(config, layout_of(config, 2))
        layers_and_batches = 2 * 2
        assert sum(part.messages for part in planned) == layers_and_batches * (10 if recompute in ("selective", "full") else 7)
        assert [messages for messages, _ in ranks] == [sum(part.messages for part in planned)] * 2, recompute
        assert sum(bytes_ for _, bytes_ in ranks) == 2 * sum(part.bytes for part in planned), recompute


def test_experts_are_summed_over_the_ranks_that_have_them():
    config = split()
    sums = {(part.what, part.group): part for part in update_messages(config, layout_of(config, 8))}
    own = 2 * 4 * EXPERT
    assert sums["scatter of experts' gradients", "expert replicas"].bytes == 4 * own
    assert sums["gather of updated experts", "expert replicas"].bytes == 2 * own
    assert all(part.ranks == 4 for (_, group), part in sums.items() if group == "expert replicas")


def test_uneven_loads_cost_time_and_memory():
    config, device = split(), accelerator("h100")
    even = layout_of(config, 8)
    uneven = replace(even, expert_load=2.0)
    assert predict(config, uneven, device).seconds > predict(config, even, device).seconds
    assert memory(config, uneven).activations > memory(config, even).activations


@pytest.mark.parametrize(
    ("options", "possible"),
    [
        ({"expert_parallel_size": 4}, True),
        ({"expert_parallel_size": 3}, False),
        ({"expert_parallel_size": 4, "data_parallel_size": 2}, False),
        ({"zero_stage": 3}, False),
        ({"zero_stage": 3, "expert_parallel_size": 1}, True),
        ({"zero_stage": 3, "engine": "fold"}, True),
        ({"offload": "cpu"}, False),
    ],
)
def test_the_search_tries_what_can_be_split(options: dict[str, Any], possible: bool):
    config = split()
    assert can_split_experts(config, replace(layout_of(config, 8), **options)) is possible


def test_ranks_that_do_not_divide_are_one_sentence():
    with pytest.raises(ValueError, match="does not divide the 2 ranks"):
        layout_of(split("parallel.expert_parallel_size=4", "train.global_batch_size=4"), 2)


def test_a_plan_of_split_experts_shows_uneven_loads():
    plan = make_plan(load_config("deepseek-v2-lite"), 32, "h100")
    assert plan.experts is not None and plan.experts.per_rank == 8
    steps = [each.step.seconds for each in plan.experts.uneven]
    assert plan.configured is not None and plan.configured.step.seconds < steps[0] < steps[1]
    assert round(plan.parameters["active"] / 1e9, 2) == 2.66
    assert all(each.layout.zero_stage < 3 for each in plan.ranked if each.layout.expert_parallel_size > 1)
