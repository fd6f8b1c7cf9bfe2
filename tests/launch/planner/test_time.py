"""The time of a step against sums done by hand."""

from dataclasses import replace

import pytest

from launch.planner.communication import Message
from launch.planner.memory import layout_of
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
