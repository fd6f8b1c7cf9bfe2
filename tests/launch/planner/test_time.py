"""The time of a step against sums done by hand."""

from dataclasses import replace

import pytest

from launch.config import RunConfig
from launch.planner.communication import Message
from launch.planner.memory import layout_of, memory, whole_update
from launch.planner.time import ACCELERATORS, Assumptions, accelerator, predict
from model.flops import flops_per_token
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
