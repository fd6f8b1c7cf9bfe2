"""The plan: layouts found, refused with a reason, printed, and as JSON."""

from copy import deepcopy

import pytest

from launch.config import RunConfig
from launch.load_config import build_config
from launch.planner.layouts import choose_layout, choose_recompute, coverage, make_plan
from model.flops import flops_per_token
from model.sizes import parameter_counts

LLAMA_8B = {
    "model": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
    },
    "optimizer": {"rules": {"embedding": {"rows": "seen"}}},
    "data": {"train": [{"path": "web", "weight": 3.0}, {"path": "code", "weight": 1.0}]},
    "train": {"steps": 1000, "sequence_length": 4096, "global_batch_size": 256, "micro_batch_size": 2},
}  # fmt: skip


def llama(*overrides: str) -> RunConfig:
    return build_config(deepcopy(LLAMA_8B), overrides)


def test_layouts_are_ranked_and_fit():
    made = make_plan(llama(), 64, "h200")
    times = [candidate.step.seconds for candidate in made.ranked]
    assert times == sorted(times)
    assert {candidate.layout.engine for candidate in made.ranked} == {"zero", "fold"}
    assert all(candidate.memory.peak <= 141e9 for candidate in made.ranked)
    assert all(0.1 < candidate.mfu < 0.8 for candidate in made.ranked)
    assert made.parameters == parameter_counts(llama().model)
    assert made.flops_per_token["full"] == flops_per_token(llama().model, 4096, causal=False)


def test_days_follow_from_tokens():
    made = make_plan(llama(), 8, "h200")
    best = made.ranked[0]
    tokens = 1000 * 256 * 4096
    assert best.days == pytest.approx(tokens / (8 * best.step.tokens_per_second_per_gpu) / 86400)


def test_more_ranks_take_less_time():
    days = [make_plan(llama(), gpus, "h100").ranked[0].days for gpus in (8, 32, 128)]
    assert days[0] > 3 * days[1] > 6 * days[2]


@pytest.mark.parametrize(
    ("overrides", "gpus", "gpu", "name", "reason"),
    [
        ([], 1, "a100-40", "ZeRO-1 1x1", "needs .* GB per rank, .* of it training state.*a100-40 has 36.8 GB to use"),
        (["optimizer.name=adamw"], 8, "h200", "fold", "cannot run optimizer.name = 'adamw'"),
        (
            ["model.num_attention_heads=2"],
            4,
            "h200",
            "4x1",
            "num_attention_heads = 2 is not divisible by parallel.tensor_parallel",
        ),
        ([], 96, "h200", "ZeRO-1 1x96", "train.global_batch_size = 256 does not divide over 96 data-parallel ranks"),
    ],
)
def test_a_layout_that_cannot_run_says_why(overrides, gpus, gpu, name, reason):
    config = llama("model.num_key_value_heads=2", "model.head_dim=128", *overrides)
    refused = {refusal.name: refusal.reason for refusal in make_plan(config, gpus, gpu).refused}
    with pytest.raises(ValueError, match=reason):
        raise ValueError(refused[name])


def test_the_configured_layout_is_judged_too():
    made = make_plan(llama(), 3, "h200")
    assert made.configured is None
    assert "train.global_batch_size = 256 is not a multiple of" in made.problem
    assert make_plan(llama(), 64, "h200").problem == ""


def test_unknown_accelerator_and_no_ranks():
    with pytest.raises(ValueError, match="--gpu v100 is not known; choose one of h100, h200"):
        make_plan(llama(), 8, "v100")
    with pytest.raises(ValueError, match="--gpus must be at least 1, got 0"):
        make_plan(llama(), 0, "h100")


def test_coverage_counts_epochs_over_a_curriculum():
    config = llama('data.curriculum=[{from_step = 600, sources = [{path = "code"}]}]')
    found = {source.path: source for source in coverage(config, {"web": 600 * 256 * 4096})}
    assert found["web"].epochs == pytest.approx(0.75)
    assert found["code"].tokens is None
    assert found["code"].tokens_wanted == pytest.approx((600 * 0.25 + 400) * 256 * 4096)


def test_auto_recomputation_takes_the_least_that_fits():
    config = llama("train.micro_batch_size=8", "parallel.engine=fold", "train.recompute=auto")
    assert [choose_recompute(config, 8, size) for size in (400e9, 180e9, 90e9, 1e9)] == ["none", "selective", "full", "full"]
    assert choose_recompute(llama("train.recompute=selective"), 8, 1e9) == "selective"
    configured = make_plan(config, 8, "h200").configured
    assert configured is not None and configured.layout.recompute == "full"


STAGE_3 = ("parallel.engine=zero", "parallel.zero_stage=3", "optimizer.rules.embedding.rows=all")


@pytest.mark.parametrize(
    ("overrides", "gpus", "memory_bytes", "size"),
    [
        ((), 64, 80e9, 8),
        ((), 64, 10e9, 1),  # the copy does not fit
        ((), 8, 80e9, 1),  # one node
        (("parallel.tensor_parallel_size=2",), 64, 80e9, 4),
        (("parallel.zero_hpz_partition_size=1",), 64, 80e9, 1),
        (("parallel.zero_hpz_partition_size=16",), 64, 10e9, 16),  # asked for
        (("parallel.zero_stage=2",), 64, 80e9, 1),
    ],
)
def test_zero_3_copies_weights_inside_nodes_where_there_are_several(overrides, gpus, memory_bytes, size):
    config = llama(*STAGE_3, "train.recompute=full", "train.micro_batch_size=1", *overrides)
    assert choose_layout(config, gpus, 8, memory_bytes).zero_hpz_partition_size == size


def test_a_copy_that_does_not_divide_is_refused():
    with pytest.raises(
        ValueError, match=r"zero_hpz_partition_size = 7 does not divide 64 data-parallel ranks; use the data-par"
    ):
        choose_layout(llama(*STAGE_3, "parallel.zero_hpz_partition_size=7"), 64, 8, 80e9)


def test_the_copy_takes_the_gathers_off_the_network():
    """Two micro-batches gather four times: once from all ranks, three times inside the node."""
    with_copy, without = (
        {
            part.what: part
            for part in make_plan(
                llama(*STAGE_3, f"parallel.zero_hpz_partition_size={size}"), 64, "h100"
            ).configured.step.traffic
        }
        for size in (8, 1)
    )
    far, near, before = (
        with_copy["gather of weights"],
        with_copy["gather of weights from hpZ's copy"],
        without["gather of weights"],
    )
    assert (far.link, near.link, before.link) == ("between nodes", "inside a node", "between nodes")
    # the last 10^9 elements are still there when the backward begins: one gather in each micro-batch
    assert before.bytes / 4 < far.bytes < 1.07 * before.bytes / 4
    assert near.bytes / (7 / 8) + far.bytes / (63 / 64) == pytest.approx(before.bytes / (63 / 64))


def test_a_remark_where_newton_schulz_is_a_large_part_of_a_step():
    base = ("optimizer.name=muon", "parallel.engine=zero", "train.micro_batch_size=1", "train.recompute=full")
    small, large = (make_plan(llama(*base, f"train.global_batch_size={size}"), 8, "h200") for size in (8, 256))
    assert small.configured is not None and small.configured.step.whole is not None
    share = small.configured.step.whole.seconds / small.configured.step.seconds
    assert 0.1 < share < 0.9
    assert small.remark.startswith(f"Newton-Schulz is {share:.0%} of a step of 32.8k tokens: raise train.global_batch_size, or")
    narrow = make_plan(llama(*base, "train.global_batch_size=8", "optimizer.muon.precision=fp32"), 8, "h200")
    assert "use optimizer.muon.precision=bf16" in narrow.remark
    folded = ("parallel.engine=fold", "optimizer.muon.nesterov=false", "optimizer.muon.others=tiger")
    sent = make_plan(llama(*base, *folded, "train.global_batch_size=64"), 64, "h200")
    assert sent.remark.startswith("sending Newton-Schulz's matrices makes it") and "newton_schulz_steps" not in sent.remark
    assert large.remark == "" and make_plan(llama(), 8, "h200").remark == ""
