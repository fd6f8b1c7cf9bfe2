"""The time of a step against sums done by hand."""

from dataclasses import replace

import pytest

from launch.config import RunConfig
from launch.planner.communication import Message, update_messages
from launch.planner.memory import layout_of, memory, portions_of, whole_update
from launch.planner.time import ACCELERATORS, Assumptions, StepTime, accelerator, predict
from model.flops import attention_flops_per_token, flops_per_token, matrix_flops_per_token
from tests.launch.planner.test_layouts import llama

H200 = accelerator("h200")


def test_an_unknown_accelerator_is_refused():
    with pytest.raises(ValueError, match="--gpu v100 is not known; choose one of h100, h200"):
        accelerator("v100")
    assert all(accelerator(name).name == name for name in ACCELERATORS)


def test_all_flops_at_their_rate_are_the_computation():
    """One rank, no recomputation: what model/flops.py counts, at the sustained rate of its kind."""
    config = llama("train.recompute=none")
    step = predict(config, layout_of(config, 1), H200)
    narrow = 14336 / (14336 + Assumptions().narrow_columns)
    flops = step.matrices * 989e12 * 0.80 * narrow + step.attention * 989e12 * 0.45
    assert flops == pytest.approx(256 * 4096 * flops_per_token(config.model, 4096, causal=True))
    assert step.traffic == () and step.exposed == 0
    full = predict(config, replace(layout_of(config, 1), recompute="full"), H200)
    assert full.matrices == pytest.approx(step.matrices * 4 / 3)


def one(op: str, hidden: bool = False, size: float = 16e9, group: str = "data") -> float:
    """Exposed seconds of one message between 64 ranks in 8 nodes."""
    config = llama()
    message = Message("x", op, group, 64, size, 1, hidden)  # type: ignore[arg-type]
    return predict(config, layout_of(config, 64), H200, parts=[message]).exposed


def test_a_collective_takes_its_bytes_over_the_link_and_its_hops():
    """8 ranks of a node share 8 x 50 GB/s to others."""
    gather = 16e9 * 63 / 64 / (400e9 * 0.8) + 100e-6 + 63 * 3e-6
    assert one("all-gather") == one("reduce-scatter") == pytest.approx(gather)
    tree = 2 * 16e9 * 63 / 64 / (400e9 * 0.8) + 100e-6 + 2 * 6 * 3e-6
    assert one("all-reduce") == pytest.approx(tree)


def test_overlapped_communication_slows_the_computation_and_too_much_of_it_is_exposed():
    config = llama()
    compute = predict(config, layout_of(config, 64), H200, parts=[]).compute
    seconds = one("all-reduce")
    assert seconds < 0.5 * compute and one("all-reduce", hidden=True) == pytest.approx(0.3 * seconds)
    long = one("all-reduce", size=4e12)
    assert one("all-reduce", hidden=True, size=4e12) == pytest.approx(long - 0.8 * compute)


def test_the_update_moves_the_second_moment_of_an_embedding_under_adamw():
    """Read and written, in float32, by the ranks that share it."""
    plain, second = (
        predict(made, layout_of(made, 64), accelerator("h200")).optimizer
        for made in (llama("parallel.engine=zero", f"optimizer.rules.embedding.rule={how}") for how in ("tiger", "adamw"))
    )
    bandwidth = accelerator("h200").memory_bandwidth * Assumptions().memory_efficiency
    assert second - plain == pytest.approx(8 * 128256 * 4096 / 64 / bandwidth, rel=1e-6)


LONG = ("train.sequence_length=32768", "train.micro_batch_size=1", "train.global_batch_size=4", "parallel.engine=fold")
MLA = (
    "model.attention=mla", "model.kv_lora_rank=512", "model.qk_nope_head_dim=128", "model.qk_rope_head_dim=64",
    "model.v_head_dim=128", "model.num_key_value_heads=32",
)  # fmt: skip


def shared(ranks: int, exchange: str, *overrides: str) -> StepTime:
    """A step of 4 sequences on `ranks` ranks that share each of them."""
    context = (f"parallel.context_parallel_size={ranks}", f"parallel.context_exchange={exchange}")
    config = llama(*LONG, *context, *overrides)
    return predict(config, layout_of(config, ranks), H200)


def test_ranks_that_share_a_sequence_divide_its_computation():
    one, four = shared(1, "gather"), shared(4, "gather")
    assert four.matrices == pytest.approx(one.matrices / 4) and four.attention == pytest.approx(one.attention / 4)
    # of 2 x 8 x 128 elements: packed, put in order from 4 ranks, those of 3 more rotated, and joined, each read and written
    moved = 2048 * 2 * (1 + 4 + 3 + 4) * 3 * 2 * 32 * 32768
    assert four.pointwise - one.pointwise / 4 == pytest.approx(moved / (4.8e12 * 0.8))
    assert (four.tokens, one.exchange) == (4 * 32768, 0) and four.exchange > 0


@pytest.mark.parametrize(("recompute", "passes"), [("none", 3), ("selective", 4), ("full", 4)])
def test_the_first_rank_projects_up_the_latents_of_a_whole_sequence(recompute: str, passes: int):
    """kv_b_proj: 512 -> 32 x (128 + 128). Ranks that exchange heads project up their own tokens' alone. Selective
    recomputation does not keep what others' latents give, and does it a fourth time, its own too."""
    gather, heads = (shared(4, exchange, *MLA, f"train.recompute={recompute}") for exchange in ("gather", "heads"))
    flops, own = 32 * 2 * 512 * 32 * (128 + 128), 4 * 32768 / 4
    more = flops * own * (passes * 4 - (3 if recompute == "selective" else passes))
    rate = 989e12 * 0.80 * 14336 / (14336 + 256)
    assert gather.matrices - heads.matrices == pytest.approx(more / rate, rel=1e-6)


def test_keys_are_gathered_inside_the_node_and_half_of_them_beside_attention():
    """8 key heads of 128, keys and values, in bf16; 4 sequences, 32 layers, forward and backward."""
    step = shared(4, "gather")
    messages = 4 * 32
    seconds = messages * (16384 * 2048 * 2 * 3 / 4 / (450e9 * 0.35) + 10e-6 + 3 * 3e-6)
    parts = {part.what: part for part in step.traffic if part.group == "context" and part.op != "all-reduce"}
    assert len(parts) == 4 and all(part.seconds == pytest.approx(seconds) for part in parts.values())
    assert all(part.link == "inside a node" and part.messages == messages for part in parts.values())
    # rank 0 attends for a 16th of its time while the second halves travel
    assert 2 * seconds < step.attention / 16
    assert step.exchange == pytest.approx(2 * seconds + 0.3 * 2 * seconds)


def test_heads_are_exchanged_before_and_after_attention():
    """32 query heads and 2 x 8 key and value heads there, 32 result heads back, of each rank's tokens; nothing beside it."""
    step = shared(4, "heads")
    (part,) = (part for part in step.traffic if part.op == "all-to-all")
    bytes_sent = 2 * 4 * 32 * 8192 * (32 + 2 * 8 + 32) * 128 * 2 * 3 / 4
    messages = 2 * 2 * 4 * 32
    assert (part.bytes, part.messages) == (pytest.approx(bytes_sent), messages)
    assert step.exchange == part.seconds == pytest.approx(bytes_sent / (450e9 * 0.35) + messages * (10e-6 + 3 * 3e-6))


def test_groups_of_context_ranks_lie_beside_each_other_and_data_ranks_apart():
    """2 x 4 ranks fill a node: sequences of different nodes meet over the network alone."""
    config = llama("parallel.context_parallel_size=4", "parallel.tensor_parallel_size=2")
    links = {part.group: part.link for part in predict(config, layout_of(config, 32), H200).traffic}
    assert links["context"] == links["tensor"] == "inside a node"
    assert links["data"] == links["replicas"] == links["world"] == "between nodes"
    wide = llama("parallel.context_parallel_size=16", "parallel.context_exchange=heads", "train.sequence_length=32768")
    (part,) = (part for part in predict(wide, layout_of(wide, 16), H200).traffic if part.op == "all-to-all")
    each = part.bytes * 16 / 15 / part.messages  # 8 of 16 parts go to the other node, over each rank's share of the network
    assert part.link == "between nodes"
    assert part.seconds == pytest.approx(part.messages * (each / 2 / (50e9 * 0.35) + 100e-6 + 15 * 3e-6))


def muon(*overrides: str) -> RunConfig:
    """A Llama 8B under Muon and ZeRO 1."""
    return llama("optimizer.name=muon", "parallel.engine=zero", "train.micro_batch_size=1", *overrides)


def test_an_update_waits_for_the_rank_with_most_newton_schulz():
    """666 TFLOP, 8 ranks, the most loaded 1.18 x the mean; on one card 42 % of 6 N tokens at 32k tokens, 1.3 % at 1M."""
    config = muon()
    step = predict(config, layout_of(config, 8), H200)
    whole = step.whole
    assert whole is not None and whole.flops == pytest.approx(665.9e12, rel=1e-4)
    assert whole.compute == pytest.approx(whole.flops / 8 * whole.imbalance / (989e12 * 0.80))
    assert whole.imbalance == pytest.approx(1.184, abs=1e-3)
    optimizer = config.optimizer.model_copy(update={"name": "lion"})
    plain = predict(config.model_copy(update={"optimizer": optimizer}), layout_of(config, 8), H200)
    matrices_alone = 8 * 2 * (8.03e9 - 6.98e9) / 8  # AdamW's second moments of the rest, which Lion has not
    assert step.seconds - plain.seconds == pytest.approx(whole.seconds, abs=matrices_alone / 3e12)
    assert whole.flops / (6 * 8.03e9 * 32768) == pytest.approx(0.42, abs=0.01)
    assert whole.flops / (6 * 8.03e9 * 2**20) == pytest.approx(0.0132, abs=0.001)


def test_the_exchange_is_exposed_in_its_first_and_last_round_and_where_it_is_longer_than_the_products():
    config = muon("parallel.zero_stage=3", "parallel.zero_hpz_partition_size=1")
    layout = layout_of(config, 64)
    update, slow = whole_update(config, layout), replace(H200, network_bandwidth=1e9)
    assert update is not None
    for device in (H200, slow):
        whole = predict(config, layout, device).whole
        assert whole is not None
        sent = sum(part.bytes_by_rank[part.busiest] for part in (update.to_owners, update.back))
        assert whole.exchange == pytest.approx(sent / (device.network_bandwidth * 0.8), rel=0.2)
        assert whole.exposed == max(whole.exchange / update.rounds, whole.exchange - 0.8 * whole.compute)
        assert whole.bytes == 2 * 2 * update.moved_elements


def test_gathered_matrices_are_in_the_peak_where_they_are_most():
    """On short sequences the update is the peak; in float32 a round's buffers are twice as large."""
    short = ("parallel.zero_stage=3", "train.sequence_length=16")
    more = ((), ("optimizer.muon.precision=fp32",), ("optimizer.name=lion",))
    made = [muon(*short, *overrides) for overrides in more]
    bf16, float32, lion = (memory(config, layout_of(config, 64)).peak for config in made)
    update = whole_update(made[0], layout_of(made[0], 64))
    assert update is not None and bf16 > lion
    assert float32 - bf16 == 2 * (6 + min(update.rounds, 2)) * update.batch_elements


def pipelined(*overrides: str) -> RunConfig:
    """A Llama 8B on a pipeline of 4 ranks."""
    return llama("parallel.pipeline_parallel_size=4", "parallel.engine=zero", *overrides)


@pytest.mark.parametrize(("schedule", "stages"), [("1f1b", 1), ("interleaved", 2)])
def test_a_step_is_the_slowest_ranks_and_its_bubble(schedule: str, stages: int):
    """32 ranks, 8 of each stage, 16 micro-batches: all wait for the rank with most blocks, or the head."""
    config = pipelined(f"parallel.pipeline_schedule={schedule}", "train.recompute=none")
    layout = layout_of(config, 32)
    step, tokens = predict(config, layout, H200, parts=[]), 16 * 2 * 4096
    matrix_rate, attention_rate = 989e12 * 0.80 * 14336 / (14336 + 256), 989e12 * 0.45
    seconds = [
        3 * tokens * matrix_flops_per_token(config.model, portion.layers) / matrix_rate
        + 3 * tokens * attention_flops_per_token(config.model, 4096, True, portion.layers) / attention_rate
        for portion in portions_of(config, layout)
    ]
    assert step.matrices + step.attention == pytest.approx(max(seconds), rel=1e-3)
    assert step.bubble == pytest.approx(step.compute * 3 / (16 * stages))
    assert step.seconds == pytest.approx(step.compute + step.bubble + step.optimizer)
    assert (step.tokens, step.gpus) == (256 * 4096, 32)
    alone = predict(llama("parallel.engine=zero", "train.recompute=none"), layout_of(llama(), 32), H200, parts=[])
    assert alone.bubble == 0 and alone.compute < step.compute < 1.1 * alone.compute


@pytest.mark.parametrize("gpus", [8, 32])
def test_messages_between_stages_are_waited_for_in_1f1b_and_sent_beside_computation_interleaved(gpus: int):
    """2 sequences of 4,096 tokens of 4,096 elements in bf16. In a node of 8 ranks or over the network of several."""
    stream, inside, count = 2 * 4096 * 4096 * 2, gpus == 8, 128 // (gpus // 4)
    bandwidth, latency = (450e9, 10e-6) if inside else (50e9, 100e-6)
    hop = stream / (bandwidth * 0.8) + latency + 3e-6
    exposed = {}
    for schedule, stages in (("1f1b", 1), ("interleaved", 2)):
        config = pipelined(f"parallel.pipeline_schedule={schedule}")
        layout = layout_of(config, gpus)
        parts = [part for part in update_messages(config, layout) if part.group == "pipeline" and part.op == "send"]
        step = predict(config, layout, H200, parts=parts)
        assert [part.link for part in step.traffic] == ["inside a node" if inside else "between nodes"] * 2
        assert [part.seconds for part in step.traffic] == [pytest.approx(stages * count * hop)] * 2
        exposed[schedule] = step.exposed
    waited = 2 * count * 3 / 4 + 4
    assert exposed["1f1b"] == pytest.approx(hop * (waited + 0.3 * max(0, 2 * count - waited)))
    waited = 2 * (8 - 1)
    assert exposed["interleaved"] == pytest.approx(hop * (waited + 0.3 * (4 * count - waited)))


def test_tokens_that_are_split_are_sent_by_one_rank_each():
    shape = ("parallel.tensor_parallel_size=2", "parallel.sequence_parallel=true")
    whole, split = (
        {part.what: part for part in predict(made, layout_of(made, 32), H200).traffic}
        for made in (pipelined(shape[0]), pipelined(*shape))
    )
    name = "streams to the next stages"
    assert split[name].bytes == whole[name].bytes / 2 and split[name].messages == whole[name].messages


def test_the_bubble_waits_for_sums_of_activations_too():
    config = pipelined("parallel.tensor_parallel_size=2")
    step = predict(config, layout_of(config, 32), H200)
    sums = sum(part.seconds for part in step.traffic if part.group == "tensor")
    assert sums > 0 and step.bubble == pytest.approx((step.compute + sums) * 3 / 32)


def test_ranks_of_a_stage_compute_its_whole_matrices():
    """All of a network's operations together; the ranks of the stage with most blocks are the slowest."""
    config = muon("parallel.pipeline_parallel_size=4")
    layout = layout_of(config, 32)
    step = predict(config, layout, H200)
    assert step.whole is not None and step.whole.flops == pytest.approx(665.9e12, rel=1e-4)
    updates = [whole_update(config, layout, rank) for rank in range(4)]
    assert [update and len(update.matrices) for update in updates] == [7 * len(p.layers) for p in portions_of(config, layout)]
    most = max(update.most_loaded_flops for update in updates if update)
    assert step.whole.compute == pytest.approx(most / (989e12 * 0.80))
    assert step.whole.imbalance == pytest.approx(most * 32 / step.whole.flops)
    groups = {(part.group, part.ranks) for part in step.traffic if part.op == "send"}
    assert groups <= {("stage", 8), ("pipeline", 4)}
