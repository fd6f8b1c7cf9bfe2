"""Bytes per rank against sums done by hand."""

from copy import deepcopy
from dataclasses import replace

import pytest

from launch.config import RunConfig
from launch.load_config import build_config
from launch.planner.memory import Layout, execution_of, layout_of, memory, memory_of_rank, state, stream_bytes
from model.activations import activations
from model.sizes import parameter_counts

SMALL = {
    "model": {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "train": {"global_batch_size": 16, "micro_batch_size": 2, "sequence_length": 32},
}


def config(*overrides: str) -> RunConfig:
    return build_config(deepcopy(SMALL), overrides)


def test_adamw_with_accumulation_is_twenty_bytes_a_parameter_on_one_rank():
    """bf16 weights and gradients; float32 master, two moments and sum of the gradients."""
    made = config("optimizer.name=adamw")
    held, numbers = state(made, layout_of(made, 1)), parameter_counts(made.model)["total"]
    assert held.training_state == 20 * numbers
    assert (held.masters, held.states) == (4 * numbers, 8 * numbers)


@pytest.mark.parametrize(("stage", "weights", "gradients"), [(1, 2, 6), (2, 2, 1), (3, 0.5, 1)])
def test_each_stage_shares_more(stage, weights, gradients):
    made = config(f"parallel.zero_stage={stage}")
    held, numbers = state(made, layout_of(made, 4)), parameter_counts(made.model)["total"]
    assert (held.weights, held.gradients) == (int(weights * numbers), int(gradients * numbers))
    assert held.masters == held.states == numbers


def test_ranks_that_share_sequences_share_the_state_as_data_ranks_do():
    """In every engine; and a micro-batch's sequences go to data ranks only."""
    for engine in (("parallel.zero_stage=1",), ("parallel.zero_stage=3",), ("parallel.engine=fold",)):
        whole, shared = config(*engine), config(*engine, "parallel.context_parallel_size=2", "train.global_batch_size=8")
        assert state(whole, layout_of(whole, 4)) == state(shared, layout_of(shared, 4))
        assert memory(whole, layout_of(whole, 4)).buffers == memory(shared, layout_of(shared, 4)).buffers > 0
    layout = layout_of(config("parallel.context_parallel_size=2"), 4)
    assert (layout.data_parallel_size, layout.replicas, layout.gpus, layout.micro_batches) == (2, 4, 4, 4)
    assert (layout.tokens(32), layout.ranks, layout.replica_group) == (2 * 32 // 2, "1x2x2", "replicas")


def test_names_of_layouts_say_how_sequences_are_shared():
    layout = layout_of(config("parallel.context_parallel_size=2", "parallel.context_exchange=heads"), 4)
    assert layout.name == "ZeRO-1 1x2x2 heads"
    assert replace(layout, context_exchange="gather").name == "ZeRO-1 1x2x2"
    assert replace(layout, context_parallel_size=1).name == "ZeRO-1 1x2"
    assert replace(layout, data_parallel_size=1).replica_group == "context"


def test_a_shared_sequence_takes_less_of_each_rank():
    """Keys gathered from all ranks stay; all else is divided."""
    shape = ("train.sequence_length=8192", "train.micro_batch_size=1", "model.vocab_size=64")
    one = config(*shape)
    whole = memory(one, layout_of(one, 1)).activations
    for exchange in ("gather", "heads"):
        made = [config(*shape, f"parallel.context_parallel_size={n}", f"parallel.context_exchange={exchange}") for n in (2, 4)]
        two, four = (memory(each, layout_of(each, n)).activations for each, n in zip(made, (2, 4), strict=True))
        assert whole > two > four > whole / 4
        assert exchange == "gather" or four == two / 2


def test_hpz_holds_the_weights_once_more_in_each_node():
    made = config("parallel.zero_stage=3")
    layout, numbers = layout_of(made, 8), parameter_counts(made.model)["total"]
    assert state(made, layout).weights == 2 * numbers // 8
    assert state(made, replace(layout, zero_hpz_partition_size=4)).weights == 2 * numbers // 8 + 2 * numbers // 4
    assert replace(layout, zero_hpz_partition_size=4).name == "ZeRO-3+hpZ 1x8"


def test_fold_is_four_bytes_and_at_its_peak_the_largest_gradient():
    made = config("parallel.engine=fold", "train.micro_batch_size=1", "train.sequence_length=2")
    held, numbers = memory(made, layout_of(made, 1)), parameter_counts(made.model)["total"]
    assert held.training_state == 4 * numbers
    assert held.peak == held.training_state + 2 * 512 * 64 + held.activations + held.logits


def test_fold_has_two_float32_buckets_on_their_way_and_a_large_tensor_alone_in_one():
    made = config("parallel.engine=fold", "parallel.reduce_bucket_elements=10000", "model.tie_word_embeddings=false")
    head, down_proj_and_norm = 512 * 64, 64 + 64 * 128
    assert memory(made, layout_of(made, 4)).buffers == 4 * (head + down_proj_and_norm)
    assert memory(made, layout_of(made, 1)).buffers == 0


def test_folds_buckets_come_after_the_loss():
    """The last backward fills them, when the logits are gone."""
    made = config("parallel.engine=fold", "train.sequence_length=512", "model.vocab_size=20000", "train.recompute=full")
    alone, together = (memory(made, layout_of(made, ranks)) for ranks in (1, 4))
    assert together.buffers > 0 and together.peak == alone.peak  # the loss is the peak
    short = config("parallel.engine=fold", "train.sequence_length=2", "train.micro_batch_size=1")
    alone, together = (memory(short, layout_of(short, ranks)) for ranks in (1, 4))
    assert alone.peak < together.peak <= alone.peak + together.buffers


def test_embedding_under_adamw_has_a_second_moment():
    made = config("optimizer.rules.embedding.rule=adamw")
    assert state(made, layout_of(made, 1)).states == 4 * (parameter_counts(made.model)["total"] + 512 * 64)


def test_tensor_parallel_ranks_hold_the_norms_whole():
    made = config("parallel.tensor_parallel_size=2")
    numbers = parameter_counts(made.model)
    assert state(made, layout_of(made, 2)).weights == 2 * ((numbers["total"] - numbers["norms"]) // 2 + numbers["norms"])


def test_offload_moves_masters_and_states_to_the_host():
    made = config("parallel.offload=cpu")
    held = state(made, layout_of(made, 2))
    assert held.masters == held.states == 0
    assert held.host == 3 * 4 * parameter_counts(made.model)["total"] // 2


def test_recomputation_keeps_less():
    made = [config("model.num_hidden_layers=8", f"train.recompute={how}") for how in ("none", "selective", "full")]
    none, selective, full = (memory(each, layout_of(each, 1)) for each in made)
    assert none.activations > selective.activations > full.activations
    assert none.peak > selective.peak > full.peak > full.training_state


def test_ranks_that_do_not_divide_are_named():
    made = config("parallel.tensor_parallel_size=2")
    with pytest.raises(ValueError, match=r"3 ranks cannot form groups of parallel.tensor_parallel_size = 2"):
        layout_of(made, 3)
    with pytest.raises(ValueError, match=r"train.global_batch_size = 16 is not a multiple of train.micro_batch_size = "):
        layout_of(made, 6)


def pipelined(*overrides: str) -> tuple[RunConfig, Layout, list[int]]:
    """Two blocks on a pipeline of 2 and twice 2 ranks, with 4 micro-batches; and the elements that each rank owns."""
    made = config("parallel.pipeline_parallel_size=2", "train.global_batch_size=16", *overrides)
    counts = parameter_counts(made.model)
    block = (counts["attention"] + counts["mlp"]) // 2 + 2 * 64
    return made, layout_of(made, 4), [counts["embedding"] + block, block + 64 + counts["head"]]


@pytest.mark.parametrize(("stage", "gradients"), [(1, (4, 4)), (2, (2, 4))])
def test_a_rank_of_a_pipeline_has_the_state_of_its_own_layers(stage: int, gradients: tuple[int, int]):
    """Masters and states on 2 ranks with the same layers; sums in float32, in stage 1 whole. The last rank has the tied
    embedding's weights once more, and the sum of their gradient."""
    made, layout, owned = pipelined(f"parallel.zero_stage={stage}")
    copy = 512 * 64
    for rank, extra in ((0, 0), (1, copy)):
        held = state(made, layout, rank)
        assert held.weights == 2 * (owned[rank] + extra) and held.masters == held.states == 2 * owned[rank]
        assert held.gradients == gradients[0] * owned[rank] + gradients[1] * extra
    assert sum(owned) == parameter_counts(made.model)["total"]
    untied, layout, owned = pipelined("model.tie_word_embeddings=false", f"parallel.zero_stage={stage}")
    assert [state(untied, layout, rank).weights for rank in (0, 1)] == [2 * each for each in owned]


def test_fold_in_a_pipeline_sums_a_copys_gradient_alone():
    made, layout, owned = pipelined("parallel.engine=fold")
    first, last = state(made, layout, 0), state(made, layout, 1)
    assert (first.weights, first.states, first.gradients) == (2 * owned[0], 2 * owned[0], 0)
    assert (last.weights, last.states, last.gradients) == (2 * (owned[1] + 512 * 64), 2 * owned[1], 4 * 512 * 64)


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved"])
def test_micro_batches_in_flight_keep_their_blocks_and_streams(schedule: str):
    """1F1B: rank 0 of 2 has two in flight, the last one, with a stream each. Interleaved: 5 and 3 forwards of one block each,
    of which those of the stages 1 and 2 have two streams; the final norm's is one of them. Two streams are on their way, and
    the mlp's gate and up have gradients in the backward of a block."""
    shape = ("model.num_hidden_layers=4", "train.sequence_length=256", "train.recompute=none")
    made, layout, _ = pipelined(f"parallel.pipeline_schedule={schedule}", *shape)
    execution, blocks = execution_of(made, layout, "cuda"), 2 if schedule == "1f1b" else 1
    block = activations(made.model, 512, 256, execution, (0,)).kept
    norm = activations(made.model, 512, 256, execution, (3,)).kept - block
    assert stream_bytes(made, layout) == 512 * 64 * 2 and norm > 0
    gradients = 2 * 512 * made.model.intermediate_size * 2
    expected = ((2, 2, 0), (1, 1, norm)) if schedule == "1f1b" else ((5, 7, 0), (3, 5, norm))
    for rank, (forwards, streams, last) in enumerate(expected):
        kept = forwards * blocks * block + (streams + 2) * stream_bytes(made, layout) + last
        assert memory_of_rank(made, layout, rank).activations == kept + gradients
    assert memory_of_rank(made, layout, 0).logits == 0 < memory_of_rank(made, layout, 1).logits


def test_the_fullest_rank_of_a_pipeline_is_the_layouts():
    made, layout, _ = pipelined("model.num_hidden_layers=8", "train.sequence_length=512", "train.recompute=none")
    ranks = [memory_of_rank(made, layout, rank) for rank in (0, 1)]
    assert memory(made, layout) == max(ranks, key=lambda held: held.peak) and ranks[0].activations > ranks[1].activations
    alone = replace(layout, pipeline_parallel_size=1)
    assert memory(made, alone).peak > memory(made, layout).peak


def test_buckets_of_a_pipeline():
    """Stage 1: one in float32, in the update. Stage 2: two in float32, and gradients in bf16 that wait for the third."""
    bucket = "parallel.reduce_bucket_elements=10000"
    (one, layout, _), (two, second, _) = pipelined(bucket), pipelined(bucket, "parallel.zero_stage=2")
    assert memory_of_rank(one, layout, 0).buffers == 4 * 10000
    down_and_norms, embedding = 64 * 128 + 64, 512 * 64
    held = memory_of_rank(two, second, 0).buffers
    assert held == 4 * (embedding + 2 * 64 * 64 + 64) + 2 * embedding and held > 4 * down_and_norms
    alone = layout_of(two, 2)
    assert memory_of_rank(two, alone, 0).buffers == 0


def test_the_update_of_a_pipeline_follows_the_sums():
    """On one token per sequence the peak is the update: a float32 bucket, gradients and their step of this rank's part."""
    made, layout, owned = pipelined("train.sequence_length=2", "train.micro_batch_size=1", "train.global_batch_size=8",
                                    "model.tie_word_embeddings=false")  # fmt: skip
    held = memory_of_rank(made, layout, 0)
    bucket = 4 * owned[0]  # all of it is less than the default bucket
    assert held.peak == held.training_state + bucket + 2 * owned[0] // 2
