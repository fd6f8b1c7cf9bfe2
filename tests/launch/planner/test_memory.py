"""Bytes per rank against sums done by hand."""

from copy import deepcopy
from dataclasses import replace

import pytest

from launch.config import RunConfig
from launch.load_config import build_config
from launch.planner.memory import layout_of, memory, state
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
