"""Health rules: which steps are unhealthy, what is done, and that a resumed run decides like the unbroken one."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config import HealthConfig
from trainer.monitoring.health import LEAST_SAMPLES, Health

CALM = [3.0 + 0.01 * (-1) ** step for step in range(LEAST_SAMPLES)]  # mean 3, deviation 0.01


def _calm(**settings) -> Health:
    health = Health(HealthConfig(**settings))
    assert all(health.check(step, loss, False).action == "go" for step, loss in enumerate(CALM))
    return health


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_is_left_out(loss: float):
    verdict = _calm().check(99, loss, skipped=False)
    assert (verdict.action, verdict.what) == ("skip", "non-finite")
    assert str(loss) in verdict.sentence and "step 99" in verdict.sentence


def test_a_gradient_that_is_no_number_is_left_out_and_not_remembered():
    health = _calm()
    verdict = health.check(99, 3.0, skipped=True)
    assert (verdict.action, verdict.what) == ("skip", "non-finite")
    assert "gradient is not finite" in verdict.sentence
    assert health.state()["losses"] == CALM


def test_too_many_left_out_in_a_row_end_the_run_with_advice():
    health = Health(HealthConfig(max_skipped_steps=3))
    actions = [health.check(step, math.nan, False).action for step in range(2)]
    last = health.check(2, math.nan, False)
    assert actions == ["skip", "skip"] and last.action == "stop"
    assert "max_skipped_steps = 3" in last.sentence and "lower the learning rate" in last.sentence


def test_one_good_step_starts_the_count_again():
    health = Health(HealthConfig(max_skipped_steps=3))
    losses = [math.nan, math.nan, 3.0, math.nan, math.nan]
    assert [health.check(step, loss, False).action for step, loss in enumerate(losses)] == [
        "skip",
        "skip",
        "go",
        "skip",
        "skip",
    ]


def test_spikes_are_off_by_default():
    assert _calm().check(99, 1e9, False).sentence == ""


@pytest.mark.parametrize(("action", "wanted"), [("record", "go"), ("skip", "skip"), ("rewind", "rewind")])
def test_a_spike_is_answered_by_choice(action: str, wanted: str):
    verdict = _calm(spike_sigmas=6.0, spike_action=action).check(99, 3.07, False)
    assert (verdict.action, verdict.what) == (wanted, "spike")
    assert "7.0 deviations" in verdict.sentence
    record = verdict.record(99)
    assert (record["kind"], record["step"], record["what"], record["action"]) == ("health", 99, "spike", wanted)


@pytest.mark.parametrize(("loss", "wanted"), [(3.07, True), (3.05, False), (1.0, False), (math.nan, False), (math.inf, False)])
def test_a_spike_can_be_asked_for_before_the_update(loss: float, wanted: bool):
    assert _calm(spike_sigmas=6.0, spike_action="skip").is_spike(torch.tensor(loss)) is wanted
    assert _calm().is_spike(loss) is False


def test_below_the_threshold_is_no_spike():
    assert _calm(spike_sigmas=6.0, spike_action="skip").check(99, 3.05, False).action == "go"


def test_a_fall_is_no_spike():
    assert _calm(spike_sigmas=6.0, spike_action="skip").check(99, 1.0, False).action == "go"


def test_few_losses_mean_nothing_yet():
    health = Health(HealthConfig(spike_sigmas=1.0, spike_action="skip"))
    assert [health.check(step, 10.0**step, False).action for step in range(LEAST_SAMPLES)] == ["go"] * LEAST_SAMPLES


def test_a_recorded_spike_enters_the_window_so_a_new_level_is_learnt():
    health = _calm(spike_sigmas=3.0, spike_action="record", spike_window_steps=LEAST_SAMPLES)
    sentences = [health.check(step, 4.0, False).sentence for step in range(100, 120)]
    assert sentences[0] and not sentences[-1]


def test_a_level_that_stays_up_ends_a_run_that_skips():
    health = _calm(spike_sigmas=3.0, spike_action="skip", max_skipped_steps=5)
    assert [health.check(step, 4.0, False).action for step in range(5)] == ["skip"] * 4 + ["stop"]


def test_rewinding_for_ever_ends_the_run():
    health = _calm(spike_sigmas=3.0, spike_action="rewind", max_skipped_steps=3)
    at_checkpoint, verdicts = health.state(), []
    for _ in range(3):
        verdicts.append(health.check(99, 4.0, False))
        health.rewind(at_checkpoint)
    assert [verdict.action for verdict in verdicts] == ["rewind", "rewind", "stop"]
    assert "max_skipped_steps = 3 times without getting past this step" in verdicts[-1].sentence


def test_rewinds_between_which_the_run_got_further_are_not_in_a_row():
    health = _calm(spike_sigmas=3.0, spike_action="rewind", max_skipped_steps=2)
    for spike in range(100, 200, 10):
        at_checkpoint = health.state()
        assert health.check(spike, 4.0, False).action == "rewind"
        health.rewind(at_checkpoint)
        health.check(spike, 3.0, False)
        health.check(spike + 1, 3.0, False)
    assert health.check(300, 4.0, False).action == "rewind"
    health.rewind(at_checkpoint)
    health.check(299, 3.0, False)  # good, but not yet past the spike
    assert health.check(299, 4.0, False).action == "stop"


def test_going_back_forgets_the_losses_since_the_checkpoint():
    health = _calm(spike_sigmas=3.0, spike_action="rewind")
    at_checkpoint = health.state()
    health.check(50, 2.99, False)
    health.rewind(at_checkpoint)
    assert health.state()["losses"] == CALM


def test_a_loss_that_does_not_move_makes_no_spike_of_a_rounding():
    health = Health(HealthConfig(spike_sigmas=6.0, spike_action="skip"))
    for step in range(LEAST_SAMPLES):
        health.check(step, 4.0, False)
    assert health.check(98, 4.000001, False).action == "go"
    assert health.check(99, 4.1, False).action == "skip"


def test_a_planned_change_of_data_is_no_spike():
    health = _calm(spike_sigmas=6.0, spike_action="skip")
    health.forget()
    assert health.check(99, 8.0, False).action == "go"


@settings(deadline=None)
@given(
    losses=st.lists(st.one_of(st.floats(1, 10), st.just(math.nan), st.just(1e6)), min_size=1, max_size=80),
    cut=st.integers(0, 80),
    action=st.sampled_from(["record", "skip", "rewind"]),
)
def test_a_resumed_run_judges_as_the_unbroken_one(losses: list[float], cut: int, action: str):
    settings = HealthConfig(spike_sigmas=2.0, spike_window_steps=20, spike_action=action, max_skipped_steps=3)
    unbroken = Health(settings)
    whole = [unbroken.check(step, loss, False).action for step, loss in enumerate(losses)]
    first = Health(settings)
    actions = [first.check(step, loss, False).action for step, loss in enumerate(losses[:cut])]
    second = Health(settings)
    second.resume(json.loads(json.dumps(first.state())))
    actions += [second.check(step, loss, False).action for step, loss in enumerate(losses[cut:])]
    assert actions == whole
