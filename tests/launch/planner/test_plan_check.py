"""The planner's bytes against a live engine; benchmarks/plan_check.py does the same for many layouts."""

from copy import deepcopy

import pytest

from benchmarks.plan_check import BASE, INTERLEAVED, MLA, PIPELINE_2, measure
from launch.load_config import build_config
from launch.planner.memory import layout_of, memory, memory_of_rank
from tests.ranks import run_ranks

SMALL = [
    "parallel.engine=fold", "model.num_hidden_layers=4", "model.hidden_size=256", "model.vocab_size=1024",
    "train.global_batch_size=4",
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*Profiler clears events:UserWarning:torch.*")  # torch 2.11 tells every profile
@pytest.mark.parametrize("options", [[], MLA, ["train.recompute=full"]], ids=["gqa", "mla", "full recomputation"])
def test_state_within_two_percent_and_peak_within_ten(options):
    config = build_config(deepcopy(BASE), [*SMALL, *options])
    held = memory(config, layout_of(config, 1), "cpu")
    state, peak = measure(0, 1, deepcopy(BASE), [*SMALL, *options])
    assert held.training_state == pytest.approx(state, rel=0.02)
    assert held.peak == pytest.approx(peak, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [[], INTERLEAVED, ["parallel.engine=zero", "parallel.zero_stage=1", "model.tie_word_embeddings=false"]],
    ids=["fold", "fold interleaved", "ZeRO-1 untied"],
)
def test_ranks_of_a_pipeline(options):
    """Each of two, of 8 micro-batches; an interleaved schedule that kept all that it sends would hold a fifth more."""
    values = [*SMALL, PIPELINE_2, *options, "train.global_batch_size=32"]
    config = build_config(deepcopy(BASE), values)
    for rank, (state, peak) in enumerate(run_ranks(measure, 2, deepcopy(BASE), values)):
        held = memory_of_rank(config, layout_of(config, 2), rank, "cpu")
        assert held.training_state == pytest.approx(state, rel=0.03)
        assert held.peak == pytest.approx(peak, rel=0.1)
