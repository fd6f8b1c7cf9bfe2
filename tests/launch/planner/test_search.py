"""Which layouts a search lists, and which it refuses, where ranks may share sequences."""

from dataclasses import replace

import pytest

from launch.planner.memory import Layout
from launch.planner.search import Candidate, exchange_candidates, search
from launch.planner.time import accelerator
from tests.launch.planner.test_layouts import llama

H200, A100 = accelerator("h200"), accelerator("a100")
MLA = (
    "model.attention=mla", "model.kv_lora_rank=512", "model.qk_nope_head_dim=128", "model.qk_rope_head_dim=64",
    "model.v_head_dim=128", "model.num_key_value_heads=32",
)  # fmt: skip


def contexts(found: list[Candidate]) -> dict[int, int]:
    """Context-parallel size -> layouts with it."""
    sizes = [candidate.layout.context_parallel_size for candidate in found]
    return {size: sizes.count(size) for size in sizes}


def long(tokens: int, sequences: int, *overrides: str):
    shape = (f"train.sequence_length={tokens}", f"train.global_batch_size={sequences}", "train.micro_batch_size=1")
    return llama(*shape, *overrides)


def test_short_sequences_are_not_shared():
    ranked, refused = search(llama(), 64, H200)
    assert set(contexts(ranked)) == {1}
    assert not any(refusal.name.startswith("context") for refusal in refused)


def test_the_configured_size_is_listed_with_every_layout():
    ranked, _ = search(llama("parallel.context_parallel_size=4"), 64, H200)
    found = contexts(ranked)
    assert set(found) == {1, 4} and found[4] >= 12
    assert all(candidate.layout.gpus == 64 for candidate in ranked)


def test_a_larger_size_is_listed_once_and_only_if_it_is_faster():
    """At 512k tokens whole sequences fit a node with tensor parallelism and full recomputation alone."""
    ranked, _ = search(long(2**19, 8), 8, H200)
    found = contexts(ranked)
    assert found[1] > 1 and set(found) > {1} and all(number == 1 for size, number in found.items() if size > 1)
    assert ranked[0].layout.context_parallel_size > 1
    best = {size: min(c.step.seconds for c in ranked if c.layout.context_parallel_size == size) for size in found}
    assert [best[size] for size in sorted(best)] == sorted(best.values(), reverse=True)


def test_where_no_smaller_size_fits_each_is_refused_in_a_line():
    ranked, refused = search(long(2**21, 8), 8, accelerator("a100-40"))
    shared = [refusal for refusal in refused if refusal.name.startswith("context")]
    assert not ranked and [refusal.name for refusal in shared] == ["context 2", "context 4", "context 8"]
    assert all(refusal.reason.startswith("its smallest, ") and "x8x1" not in refusal.name for refusal in shared)
    assert "1x8x1" in shared[2].reason and "needs" in shared[2].reason


def test_a_length_that_does_not_divide_into_chunks_says_so():
    config = long(4096, 8, "parallel.context_parallel_size=2").model_copy()
    train = config.train.model_copy(update={"sequence_length": 4098})
    _, refused = search(config.model_copy(update={"train": train}), 8, H200)
    assert ("1x2x4", "train.sequence_length = 4098 does not divide into 4 chunks of its context-parallel ranks") in [
        (refusal.name, refusal.reason) for refusal in refused
    ]


@pytest.mark.parametrize(
    ("overrides", "context", "tensor", "possible"),
    [
        ((), 1, 1, []),
        ((), 2, 1, ["gather", "heads"]),  # 32 query heads, 8 key heads
        ((), 16, 1, ["gather", "heads"]),  # the key heads are repeated
        ((), 64, 1, ["gather"]),
        ((), 16, 4, ["gather"]),  # 8 query heads on a rank
        (("model.num_attention_heads=12", "model.num_key_value_heads=4", "model.head_dim=128"), 6, 1, ["gather"]),
        (MLA, 8, 1, ["gather", "heads"]),
        (MLA, 8, 8, ["gather"]),
    ],
)
def test_heads_are_exchanged_where_ranks_divide_them(overrides, context, tensor, possible):
    config = llama(*overrides, "train.sequence_length=24576")
    layout = Layout(1, tensor, False, "fold", 1, "none", 1, 1, "none", context_parallel_size=context)
    configured = Candidate(layout, None, None, 0, 0, True)  # type: ignore[arg-type]
    found = exchange_candidates(config, configured, H200)
    assert [candidate.layout.context_exchange for candidate in found] == possible


def pipelines(found: list[Candidate]) -> dict[int, int]:
    """Pipeline-parallel size -> layouts with it."""
    sizes = [candidate.layout.pipeline_parallel_size for candidate in found]
    return {size: sizes.count(size) for size in sizes}


LARGE = (
    "model.hidden_size=8192", "model.intermediate_size=28672", "model.num_hidden_layers=80", "model.num_attention_heads=64",
    "optimizer.name=adamw", "optimizer.rules.embedding.rows=all", "train.sequence_length=2048",
)  # fmt: skip
"""A Llama 70B."""


def test_a_network_that_fits_has_no_pipeline():
    ranked, refused = search(llama(), 64, H200)
    assert pipelines(ranked) == {1: len(ranked)} and not any("pipeline" in refusal.name for refusal in refused)


def test_the_configured_pipeline_is_listed_with_every_layout_that_it_can_have():
    ranked, _ = search(llama("parallel.pipeline_parallel_size=4"), 64, H200)
    found = [candidate.layout for candidate in ranked if candidate.layout.pipeline_parallel_size == 4]
    assert {(layout.engine, layout.zero_stage) for layout in found} == {("zero", 1), ("zero", 2), ("fold", 1)}
    assert set(pipelines(ranked)) == {1, 4} and len(found) == 12
    assert all(layout.gpus == 64 and layout.micro_batches >= 4 for layout in found)
    assert {layout.pipeline_schedule for layout in found} <= {"1f1b", "interleaved"}


def test_a_larger_pipeline_is_listed_once_and_only_if_it_is_faster():
    """70B on 4 nodes with slow links between them, over which ZeRO-3 gathers all weights."""
    ranked, _ = search(llama(*LARGE, "train.global_batch_size=512"), 32, replace(A100, network_bandwidth=2e9))
    found = pipelines(ranked)
    assert found[1] > 1 and set(found) > {1} and all(count == 1 for size, count in found.items() if size > 1)
    assert ranked[0].layout.pipeline_parallel_size > 1
    best = {size: min(c.step.seconds for c in ranked if c.layout.pipeline_parallel_size == size) for size in found}
    assert [best[size] for size in sorted(best)] == sorted(best.values(), reverse=True)


def test_schedules_that_cannot_run_are_not_tried():
    """9 micro-batches of one sequence: interleaved over 4 ranks they would be two rounds of 4 and one left."""
    config = llama("train.global_batch_size=9", "train.micro_batch_size=1", "parallel.pipeline_parallel_size=4")
    ranked, _ = search(config, 4, H200)
    found = [candidate.layout for candidate in ranked if candidate.layout.pipeline_parallel_size == 4]
    assert found and {(layout.micro_batches, layout.pipeline_schedule) for layout in found} == {(9, "1f1b")}


def test_too_few_micro_batches_for_a_pipeline_say_so():
    config = llama("train.global_batch_size=8", "train.micro_batch_size=1", "parallel.pipeline_parallel_size=4")
    _, refused = search(config, 16, H200)
    reasons = {refusal.name: refusal.reason for refusal in refused}
    assert reasons["ZeRO-1 1x4 pipeline 4"] == (
        "train.global_batch_size = 8 is 2 sequences per data-parallel rank, too few for a pipeline of 4 ranks"
    )


def test_where_nothing_fits_each_pipeline_is_refused_in_a_line():
    config = llama(*LARGE, "train.global_batch_size=64", "optimizer.muon.precision=bf16")
    ranked, refused = search(config, 8, accelerator("rtx4090"))
    lines = [refusal for refusal in refused if refusal.name.startswith("pipeline")]
    assert not ranked and [refusal.name for refusal in lines] == ["pipeline 2", "pipeline 4", "pipeline 8"]
    assert all(refusal.reason.startswith("its smallest, ") and "needs" in refusal.reason for refusal in lines)


def test_sequences_are_shared_in_a_pipeline_as_without_one():
    config = llama("parallel.pipeline_parallel_size=2", "parallel.context_parallel_size=2", "train.sequence_length=16384")
    ranked, _ = search(config, 16, H200)
    sizes = {(candidate.layout.pipeline_parallel_size, candidate.layout.context_parallel_size) for candidate in ranked}
    assert {(1, 1), (1, 2), (2, 1), (2, 2)} <= sizes
    assert all(candidate.layout.gpus == 16 for candidate in ranked)
