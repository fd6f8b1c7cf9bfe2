"""The cut, the bubble and what is in flight, against torch's own orders of forwards and backwards, run through in units of
time."""

from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.pipelining import schedules

from launch.config import RunConfig
from launch.load_config import build_config
from launch.planner.communication import SCALAR_SUMS, update_messages
from launch.planner.layouts import pipeline_of
from launch.planner.memory import layout_of, portions_of
from launch.planner.pipeline import Rounds, copied_elements, owned_elements, portions, stage_elements
from model.flops import attention_flops_per_token, flops_per_token, matrix_flops_per_token, stage_bounds
from model.sizes import elements_per_rank, parameter_counts
from tests.launch.planner.test_layouts import llama

Action = tuple[int, str, int]
"""Stage, "F" or "B", micro-batch."""


def torch_order(ranks: int, stages: int, micro_batches: int) -> list[list[Action]]:
    """By rank, its forwards and backwards, as torch's schedules put them."""
    if stages == 1:
        made: Any = SimpleNamespace(_num_stages=ranks, _n_microbatches=micro_batches)
        found = schedules.Schedule1F1B._get_pipeline_order(made)
        assert found is not None
    else:
        together = micro_batches // max(1, micro_batches // ranks)
        made = SimpleNamespace(
            n_local_stages=stages, microbatches_per_round=together, pp_group_size=ranks, _n_microbatches=micro_batches
        )
        single = schedules.ScheduleInterleaved1F1B._calculate_single_rank_operations
        found = {rank: single(made, rank) for rank in range(ranks)}
    order = []
    for rank in range(ranks):
        passed: dict[tuple[int, str], int] = {}
        actions = list[Action]()
        for action in found[rank]:
            if action is not None and (kind := action.computation_type.name) in ("FORWARD", "FULL_BACKWARD"):
                key = (action.stage_index, "F" if kind == "FORWARD" else "B")
                # numbered here: torch's 1F1B of the last rank counts its forwards from 1
                actions.append((*key, passed.setdefault(key, 0)))
                passed[key] += 1
        order.append(actions)
    return order


def simulate(ranks: int, stages: int, micro_batches: int, hop: float = 0.0) -> tuple[float, list[int]]:
    """(time, most forwards in flight by rank) where all stages of a rank take 1 forward and 2 backward, and a message `hop`,
    sent as soon as there is something to send."""
    todo, last = torch_order(ranks, stages, micro_batches), ranks * stages - 1
    done, now = dict[Action, float](), [0.0] * ranks
    held, most = [0] * ranks, [0] * ranks
    while any(todo):
        before = sum(map(len, todo))
        for rank in range(ranks):
            while todo[rank]:
                stage, kind, batch = action = todo[rank][0]
                needed = [(stage - 1, "F", batch)] if kind == "F" and stage else []
                needed += [(stage, "F", batch)] if kind == "B" else []
                needed += [(stage + 1, "B", batch)] if kind == "B" and stage < last else []
                if not done.keys() >= {*needed}:
                    break
                arrived = [done[each] + (hop if each[0] != stage else 0.0) for each in needed]
                now[rank] = max(now[rank], *arrived, 0.0) + (1 if kind == "F" else 2) / stages
                done[action] = now[rank]
                held[rank] += 1 if kind == "F" else -1
                most[rank] = max(most[rank], held[rank])
                todo[rank].pop(0)
        assert sum(map(len, todo)) < before, "the orders of the ranks wait for each other"
    return max(now), most


SHAPES = [
    (2, 1, 2), (4, 1, 4), (4, 1, 7), (4, 1, 8), (8, 1, 32), (2, 2, 2), (2, 2, 3), (4, 2, 4), (4, 2, 5), (4, 2, 6), (4, 2, 8),
    (4, 2, 10), (4, 3, 8), (4, 4, 16), (8, 2, 32),
]  # fmt: skip
"""Ranks, stages of each, micro-batches."""


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bubble_and_forwards_in_flight_are_those_of_torchs_orders(shape: tuple[int, int, int]):
    ranks, stages, micro_batches = shape
    rounds, (time, most) = Rounds(*shape), simulate(*shape)
    assert time == pytest.approx(3 * micro_batches * (1 + rounds.bubble))
    assert rounds.idle_share == pytest.approx(1 - 3 * micro_batches / time)
    assert rounds.idle_share == pytest.approx((ranks - 1) / (stages * micro_batches + ranks - 1))
    assert most == [rounds.in_flight(rank) for rank in range(ranks)]


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[2] % shape[0] == 0], ids=str)
def test_the_messages_that_ranks_wait_for(shape: tuple[int, int, int]):
    """Each makes the update longer by its own time. A rank of 1F1B holds just as many micro-batches as it computes in the time
    in which one passes the ranks behind it; an interleaved one holds more."""
    hop = 1e-3
    assert simulate(*shape, hop)[0] - simulate(*shape)[0] == pytest.approx(hop * Rounds(*shape).waits)


def test_no_pipeline_waits_for_nothing():
    alone = Rounds(1, 1, 4)
    assert (alone.bubble, alone.idle_share, alone.waits, alone.in_flight(0), alone.most(0, [7])) == (0, 0, 0, 1, 7)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_forwards_in_flight_that_cost_most_together(shape: tuple[int, int, int]):
    """With stages of 5, 7, 6, ..., every moment of torch's order."""
    ranks, stages, _ = shape
    costs = [5, 7, 6, 9][:stages]
    for rank, actions in enumerate(torch_order(*shape)):
        held, most = 0, 0
        for stage, kind, _ in actions:
            held += costs[stage // ranks] * (1 if kind == "F" else -1)
            most = max(most, held)
        assert Rounds(*shape).most(rank, costs) == most


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("ranks", "stages"), [(1, 1), (2, 1), (4, 2), (8, 4)])
def test_ranks_together_have_the_network_once(ranks: int, stages: int, tied: bool):
    config = llama(f"model.tie_word_embeddings={str(tied).lower()}", "optimizer.rules.embedding.rows=all").model
    found = portions(config, 4096, ranks, stages)
    assert sorted(layer for portion in found for layer in portion.layers) == [*range(32)]
    assert [portion.first for portion in found] == [True] + [False] * (ranks - 1)
    assert [portion.last for portion in found] == [False] * (ranks - 1) + [True]
    for size in (1, 2):
        owned = [owned_elements(config, size, portion) for portion in found]
        assert {name: count for part in owned for name, count in part.items()} == elements_per_rank(config, size)
        assert sum(map(len, owned)) == len(elements_per_rank(config, size))
        for portion, part in zip(found, owned, strict=True):
            assert sum(map(sum, stage_elements(config, size, portion))) == sum(part.values())
        copies = [copied_elements(config, size, portion) for portion in found]
        assert copies == [0] * (ranks - 1) + [128256 * 4096 // size if tied and ranks > 1 else 0]
    layers = [portion.layers for portion in found]
    assert sum(matrix_flops_per_token(config, own) for own in layers) == pytest.approx(matrix_flops_per_token(config))
    attention = sum(attention_flops_per_token(config, 4096, True, own) for own in layers)
    assert attention == pytest.approx(attention_flops_per_token(config, 4096, True))


def test_stages_are_those_of_the_engines():
    """Rank r of 4 has the stages r and 4 + r; the head costs as much as 2.4 blocks."""
    config = llama().model
    bounds, found = stage_bounds(config, 4096, 8), portions(config, 4096, 4, 2)
    for rank, portion in enumerate(found):
        assert portion.stages == tuple(tuple(range(bounds[stage], bounds[stage + 1])) for stage in (rank, 4 + rank))
    assert [len(stage) for portion in found for stage in portion.stages] == [4, 4, 4, 5, 4, 5, 4, 2]
    by_stage = stage_elements(config, 1, found[3])
    block = (parameter_counts(config)["attention"] + parameter_counts(config)["mlp"]) // 32 + 2 * 4096
    assert [sum(stage) for stage in by_stage] == [4 * block, 2 * block + 4096 + 128256 * 4096]
    with pytest.raises(ValueError, match="num_hidden_layers = 32 cannot be cut into 64 pipeline stages; use at most 32"):
        portions(config, 4096, 32, 2)


def pipelined(*overrides: str) -> RunConfig:
    """A Llama 8B on a pipeline of 4 ranks."""
    return llama("parallel.pipeline_parallel_size=4", "parallel.engine=zero", *overrides)


def test_a_layout_of_a_pipeline():
    config = pipelined("parallel.tensor_parallel_size=2", "parallel.pipeline_schedule=interleaved")
    layout = layout_of(config, 32)
    assert (layout.data_parallel_size, layout.replicas, layout.stage_ranks, layout.gpus) == (4, 4, 8, 32)
    assert layout.micro_batches == 32
    assert (layout.pipeline_stages, layout.pipeline_schedule) == (8, "interleaved")
    assert layout.name == "ZeRO-1 2x4 pipeline 4 interleaved 2" and layout.ranks in layout.name
    assert layout_of(pipelined(), 32).name == "ZeRO-1 1x8 pipeline 4"
    shared = layout_of(pipelined("parallel.context_parallel_size=2", "parallel.context_exchange=heads"), 32)
    assert (shared.name, shared.replicas) == ("ZeRO-1 1x2x4 pipeline 4 heads", 8)


def test_a_plan_says_how_the_network_is_cut():
    """Shares of the FLOPs by hand: blocks of 2 x 218M and the head's 2 x 525M."""
    config = pipelined()
    layout = layout_of(config, 32)
    found = pipeline_of(config, layout, "cuda")
    assert found is not None and pipeline_of(llama(), layout_of(llama(), 32), "cuda") is None
    assert found.schedule == "1f1b" and found.idle_share == pytest.approx(3 / (16 + 3))
    layers = [sum(rank.layers) for rank in found.ranks]
    assert sum(layers) == 32 and [rank.in_flight for rank in found.ranks] == [4, 3, 2, 1]
    block = 2 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336) + 2 * 2 * 32 * 128 * (4096 + 1) / 2
    for number, rank in enumerate(found.ranks):
        flops = 3 * (layers[number] * block + (2 * 4096 * 128256 if number == 3 else 0))
        assert rank.flops_share == pytest.approx(flops / flops_per_token(config.model, 4096, causal=True))
    assert sum(rank.flops_share for rank in found.ranks) == pytest.approx(1)


TIED = deepcopy({
    "model": {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4},
    "train": {"global_batch_size": 16, "micro_batch_size": 2, "sequence_length": 32},
    "parallel": {"pipeline_parallel_size": 2, "reduce_bucket_elements": 10_000},
})  # fmt: skip


def messages(rank: int, *overrides: str) -> dict[str, tuple[str, str, int, float, int]]:
    """By name: operation, group, ranks, bytes of all, and messages of a rank of 4, two of each stage."""
    config = build_config(deepcopy(TIED), overrides)
    found = update_messages(config, layout_of(config, 4), "cuda", rank)
    return {each.what: (each.op, each.group, each.ranks, each.bytes, each.messages) for each in found}


@pytest.mark.parametrize("rank", [0, 1])
def test_what_stages_send_each_other(rank: int):
    """4 micro-batches of 64 tokens of 64 elements in bf16, over one border; interleaved over three, two of them to rank 1."""
    stream = 64 * 64 * 2
    for what in ("streams to the next stages", "their gradients back"):
        assert messages(rank)[what] == ("send", "pipeline", 2, 4 * stream, 4)
        interleaved = messages(rank, "parallel.pipeline_schedule=interleaved")
        assert interleaved[what] == ("send", "pipeline", 2, 3 * 4 * stream, 8)
    sent = messages(rank)
    assert sent["gradient of the tied head"] == ("send", "pipeline", 2, 4 * 512 * 64, 1)
    assert sent["updated embedding to the head"] == ("broadcast", "pipeline", 2, 2 * 512 * 64, 1)
    assert not {"gradient of the tied head"} & {*messages(rank, "model.tie_word_embeddings=false")}


def test_gradients_are_summed_over_the_ranks_of_a_stage():
    """In float32: once in stage 1, in every micro-batch in stage 2; the copy of the embedding is nobody's own."""
    config = build_config(deepcopy(TIED), [])
    block = 2 * 64 * 64 + 2 * 64 * 64 + 3 * 64 * 128 + 2 * 64
    assert sum(owned_elements(config.model, 1, portions_of(config, layout_of(config, 4))[0]).values()) == 512 * 64 + 2 * block
    for rank, elements in ((0, 512 * 64 + 2 * block), (1, 2 * block + 64)):
        sent = messages(rank)
        assert sent["scatter of gradients"] == ("reduce-scatter", "data", 2, 4 * elements, -(-elements // 10_000))
        assert sent["gather of updated weights"] == ("all-gather", "data", 2, 2 * elements, 1)
        summed = messages(rank, "parallel.zero_stage=2")["sum of gradients"]
        assert summed[:4] == ("all-reduce", "data", 2, 4 * 4 * elements) and summed[4] % 4 == 0
        assert messages(rank, "parallel.engine=fold")["sum of the momentum"][3] == 4 * elements


def by_group(config: RunConfig, gpus: int, group: str, rank: int = 0) -> dict[str, tuple[float, int]]:
    """Bytes and messages of what a rank of a pipeline takes part in, by operation."""
    sent = update_messages(config, layout_of(config, gpus), "cuda", rank)
    found = [each for each in sent if each.group == group and each.what != SCALAR_SUMS]
    return {
        op: (sum(each.bytes for each in found if each.op == op), sum(each.messages for each in found if each.op == op))
        for op in {each.op for each in found}
    }


@pytest.mark.parametrize("more", [(), ("parallel.sequence_parallel=true",), ("train.recompute=selective",)], ids=str)
def test_stages_together_send_inside_a_layer_what_a_whole_network_does(more: tuple[str, ...]):
    """Over tensor-parallel ranks, at the same micro-batches: the embedding's sum on the first rank, the loss's on the last."""
    shape = ("model.num_hidden_layers=8", "parallel.tensor_parallel_size=2", "optimizer.rules.embedding.rows=all", *more)
    whole = by_group(llama(*shape, "train.global_batch_size=32"), 8, "tensor")
    cut = llama(*shape, "train.global_batch_size=32", "parallel.pipeline_parallel_size=4")
    ranks = [by_group(cut, 32, "tensor", rank) for rank in range(4)]
    for op, (volume, count) in whole.items():
        assert sum(rank[op][0] for rank in ranks) == pytest.approx(volume), op
        assert sum(rank[op][1] for rank in ranks) == count, op


def test_stages_together_exchange_keys_as_a_whole_network_does():
    shape = ("parallel.context_parallel_size=2", "train.global_batch_size=64", "optimizer.rules.embedding.rows=all")
    whole, cut = by_group(llama(*shape), 8, "context"), llama(*shape, "parallel.pipeline_parallel_size=4")
    ranks = [by_group(cut, 32, "context", rank) for rank in range(4)]
    for op in ("all-gather", "reduce-scatter"):
        assert sum(rank[op][0] for rank in ranks) == whole[op][0] and sum(rank[op][1] for rank in ranks) == whole[op][1]


def test_sums_of_a_few_numbers():
    """Losses, which the last rank has, over the pipeline; norms over all ranks; rows seen where the embedding is."""
    config = pipelined("optimizer.rules.embedding.rows=seen")
    for rank in range(4):
        found = [each for each in update_messages(config, layout_of(config, 32), "cuda", rank) if each.what == SCALAR_SUMS]
        assert [(each.bytes, each.messages) for each in found if each.group == "pipeline"] == [(4, 1)]
        assert [each.ranks for each in found if each.group == "world"] == [32]
        assert [each.bytes for each in found if each.group == "data"] == ([8, 128256] if rank == 0 else [8])
