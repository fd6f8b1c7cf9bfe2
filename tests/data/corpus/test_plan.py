import json
from dataclasses import replace

import pytest

from data.corpus.batches import BatchSizes
from data.corpus.plan import DataPlan, PlannedPhase, PlannedSource, read_plan

A, B = PlannedSource("a" * 64, 3, "/a/train"), PlannedSource("b" * 64, 1, "/b/train")
FIRST, LAST = PlannedPhase(0, (A, B)), PlannedPhase(10, (B,))
PLAN = DataPlan(5, 256, "t" * 64, BatchSizes(8), (FIRST, LAST))


def test_a_record_reads_back():
    plan = replace(PLAN, sizes=BatchSizes(8, ((3, 4),)))
    assert read_plan(json.loads(json.dumps(plan.record()))) == plan


@pytest.mark.parametrize("record", [None, {}, [], {**PLAN.record(), "phases": 3}, {**PLAN.record(), "sizes": {"last": "x"}}])
def test_what_is_no_plan_is_told(record):
    with pytest.raises(ValueError, match="no plan"):
        read_plan(record)


@pytest.mark.parametrize(
    "now",
    [
        replace(PLAN, phases=(FIRST,)),
        replace(PLAN, phases=(FIRST, replace(LAST, from_step=8))),
        replace(PLAN, phases=(FIRST, replace(LAST, from_step=30), replace(LAST, from_step=40, sources=(A,)))),
        replace(PLAN, sizes=BatchSizes(16, ((8, 8),))),
        replace(PLAN, phases=(replace(FIRST, sources=(replace(A, path="/moved"), B)),)),
    ],
)
def test_the_future_is_free(now):
    assert now.other_past(PLAN, 8) == ""


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (replace(PLAN, seed=6), "run.seed was 5 and is 6"),
        (replace(PLAN, sequence_length=128), "train.sequence_length was 256 and is 128"),
        (replace(PLAN, tokenizer="u" * 64), "data.tokenizer was tttttttttttt and is uuuuuuuuuuuu"),
        (
            replace(PLAN, sizes=BatchSizes(16)),
            "the sizes of the 8 batches so far were 8 and are 16 (train.batch_ramp = [[8, 8]]",
        ),
        (replace(PLAN, sizes=BatchSizes(8, ((2, 4),))), "batches so far were 8 and are 4 until batch 2, then 8 ("),
        (replace(PLAN, sizes=BatchSizes(9, ((2, 4), (30, 8)))), "so far were 8 and are 4 until batch 2, then 8 ("),
        (
            replace(PLAN, phases=(PlannedPhase(0, (replace(A, share=1), B)),)),
            "the mixture was 3 of /a/train (aaaaaaaaaaaa) to 1 of /b/train (bbbbbbbbbbbb) from batch 0 on and is 1 of /a",
        ),
        (replace(PLAN, phases=(PlannedPhase(0, (B, A)),)), "and is 1 of /b/train to 3 of /a/train from batch 0 on"),
        (
            replace(PLAN, phases=(PlannedPhase(0, (replace(A, fingerprint="c" * 64), B)),)),
            "and is 3 of /a/train (cccccccccccc)",
        ),
        (
            replace(PLAN, phases=(FIRST, replace(LAST, from_step=7))),
            "the mixture is 1 of /b/train from batch 7 on, and was not when those batches were read",
        ),
    ],
)
def test_the_past_must_agree(now, words):
    assert words in now.other_past(PLAN, 8)


def test_a_phase_that_is_gone_is_a_difference_once_it_has_begun():
    now = replace(PLAN, phases=(FIRST,))
    assert now.other_past(PLAN, 10) == ""
    assert "the mixture was 1 of /b/train from batch 10 on, and this configuration has no such phase" in now.other_past(
        PLAN, 11
    )


def test_at_the_first_step_only_the_first_mixture_counts_as_past():
    """A checkpoint of step 0 has read nothing, but its run is that of its first mixture."""
    assert replace(PLAN, phases=(PlannedPhase(0, (B,)),)).other_past(PLAN, 0)
