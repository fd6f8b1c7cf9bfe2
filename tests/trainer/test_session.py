"""The operations of the loop, with the parts around them replaced."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from data.storage import replace_file
from model.parallel.mesh import Mesh
from tests.trainer.rules import optimizer
from trainer.checkpoint.api import SavedCheckpoint
from trainer.checkpoint.manifest import CheckpointMeta
from trainer.config import (
    CheckpointConfig,
    EvaluateConfig,
    HealthConfig,
    ScheduleConfig,
    TrainConfig,
)
from trainer.monitoring.clock import Clock
from trainer.monitoring.config import LogConfig
from trainer.monitoring.health import LEAST_SAMPLES, Health
from trainer.monitoring.metrics import Metrics
from trainer.monitoring.records import FILE_NAME, read_records
from trainer.monitoring.signals import StopSignal, StopVote
from trainer.monitoring.watchdog import Heartbeat
from trainer.optimizers.expert_balance import StepLoads
from trainer.optimizers.step import UpdateResult
from trainer.session import LoopConfig, RunEnded, Session, peak_memory_bytes, restore, restore_weights, step_hooks
from trainer.state import State

CPU = torch.device("cpu")
_opened: list[Session] = []


@pytest.fixture(autouse=True)
def close_metrics() -> Iterator[None]:
    yield
    while _opened:
        _opened.pop().metrics.close()


def session(
    directory: Path | None = None, health: HealthConfig | None = None, mesh: Mesh | None = None, **parts: Any
) -> Session:
    health = health or HealthConfig()
    settings = LoopConfig(
        TrainConfig(steps=10), optimizer(learning_rate=0.5), ScheduleConfig(kind="constant", warmup_steps=4),
        CheckpointConfig(every_steps=2), EvaluateConfig(every_steps=3),
        LogConfig(attention_every_steps=2, spectrum_every_steps=3), health,
    )  # fmt: skip
    fakes: dict[str, Any] = {name: MagicMock(name=name) for name in ("engine", "checkpoints", "progress", "profile")}
    fakes["clock"] = Clock(CPU)
    made = Session(
        settings=settings, mesh=mesh or Mesh(), batches=lambda batch: [], batch_tokens=lambda batch: 32 * 256,
        evaluate=MagicMock(), diagnose=MagicMock(), decompose=MagicMock(),
        metrics=Metrics(replace_file, directory, LogConfig(tensorboard=False), {}),
        health=Health(health), heartbeat=Heartbeat(),
        stop=StopVote(StopSignal(), mesh or Mesh()),
        meta=lambda state, own: CheckpointMeta(state.step, state.tokens, extra=own),
        flops_per_token=lambda batch: (1.0, 2.0), peak_flops=1e9,
        **fakes | parts,
    )  # fmt: skip
    _opened.append(made)
    return made


def result(skipped: bool = False) -> UpdateResult:
    return UpdateResult(torch.tensor(1.0), torch.tensor(skipped))


def check(made: Session, losses: list[float], skipped: bool = False) -> None:
    """Health checks after updates with these losses; the last of them is still unchecked."""
    for step, loss in enumerate(losses, start=1):
        state = made.check_health(State(step, step, step))
        made.finish_update(state, torch.tensor(loss), result(skipped), left_out=False)


SPIKES = {"spike_sigmas": 3.0, "spike_window_steps": 2 * LEAST_SAMPLES}
CALM = [3.0 + 0.01 * (step % 2) for step in range(LEAST_SAMPLES)]


def test_the_learning_rate_is_that_of_the_next_update() -> None:
    assert [session().learning_rate(State(step)) for step in (0, 1, 3, 4)] == [0.125, 0.25, 0.5, 0.5]


def test_a_step_is_checked_with_the_next_one_and_a_skipped_one_is_recorded(tmp_path: Path) -> None:
    made = session(tmp_path, HealthConfig(max_skipped_steps=2))
    check(made, [2.0], skipped=True)
    assert not (tmp_path / FILE_NAME).read_text(), "its numbers are not read yet"
    made.check_health(State(2))
    made.finish_update(State(2), torch.tensor(2.0), result(skipped=True), left_out=False)
    assert [(record["step"], record["what"]) for record in read_records(tmp_path / FILE_NAME)] == [(1, "non-finite")]
    with pytest.raises(RunEnded, match=r"step 2: .*health.max_skipped_steps = 2 in a row"):
        made.check_health(State(2))


def test_a_spike_is_left_out_before_its_update() -> None:
    made = session(health=HealthConfig(spike_action="skip", **SPIKES))
    check(made, CALM)
    assert not made.is_spike(State(20), torch.tensor(3.0)) and made.is_spike(State(20), torch.tensor(9.0))
    made = session(health=HealthConfig(spike_action="record", **SPIKES))
    check(made, CALM)
    assert not made.is_spike(State(20), torch.tensor(9.0))


def test_a_spike_rewinds_to_the_newest_checkpoint_and_keeps_the_data_position(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = session(tmp_path, HealthConfig(spike_action="rewind", **SPIKES), data_changes=[18])
    made.checkpoints.newest.return_value = "checkpoints/step-8"
    meta = CheckpointMeta(8, 80, extra={"batch": 8, "health": {"losses": [1.0]}})
    made.checkpoints.load.return_value = meta
    check(made, [*CALM, 9.0])
    state = made.check_health(State(17, 170, 17))
    assert state == State(8, 80, 17)
    made.engine.loaded.assert_called_once_with(8)
    made.checkpoints.rewind.assert_called_once_with(SavedCheckpoint(8, "checkpoints/step-8"))
    assert made.heartbeat.update == 8
    assert made.health.state()["losses"] == [1.0], "of the checkpoint: no phase began in between"
    assert [record["action"] for record in read_records(tmp_path / FILE_NAME)] == ["rewind"] == [made.rewinds[0]["action"]]
    assert (
        made._meta(State(3)).extra["health"]["later_rewinds"] == made.rewinds
        and not made._meta(State(30)).extra["health"]["later_rewinds"]
    )


@pytest.mark.parametrize("fault", ["", "step-8 is damaged"])
def test_a_spike_without_a_checkpoint_ends_the_run(fault: str) -> None:
    made = session(health=HealthConfig(spike_action="rewind", **SPIKES))
    made.checkpoints.newest.side_effect = ValueError(fault) if fault else None
    made.checkpoints.newest.return_value = ""
    check(made, [*CALM, 9.0])
    with pytest.raises(RunEnded, match=f"a spike, but {fault or 'this run has no checkpoint to go back to'}"):
        made.check_health(State(17))


def test_a_change_of_the_data_clears_the_window() -> None:
    made = session(health=HealthConfig(spike_action="skip", **SPIKES), data_changes=[20])
    check(made, CALM)
    made.handle_data_change(State(19, batch=19))
    assert len(made.health.state()["losses"]) == LEAST_SAMPLES - 1, "the newest is still unchecked"
    made.handle_data_change(State(20, batch=20))
    assert made.health.state()["losses"] == []


def test_evaluations_come_when_they_are_due() -> None:
    made = session()
    for step in range(1, 8):
        made.run_evaluations(State(step), last=step == 7)
    assert [call.args[0].step for call in made.diagnose.call_args_list] == [2, 4, 6]  # type: ignore[attr-defined]
    assert [call.args[0].step for call in made.decompose.call_args_list] == [3, 6]  # type: ignore[attr-defined]
    assert [call.args[0].step for call in made.evaluate.call_args_list] == [3, 6, 7]  # type: ignore[attr-defined]


def test_saves_that_fail_end_the_run() -> None:
    made = session()
    made.checkpoints.has.return_value = False
    made.checkpoints.save.side_effect = made.checkpoints.save_final.side_effect = OSError("disk full")
    with pytest.raises(RunEnded, match="disk full"):
        made.save(State(2))
    with pytest.raises(RunEnded, match="disk full"):
        made.save_final(State(2))


def test_a_record_that_fails_is_a_message(tmp_path: Path) -> None:
    made = session(tmp_path)
    made.checkpoints.complete = None
    made.start(State())
    made.log(State(1, 10), torch.tensor(2.5), result(), 0.125)
    record = read_records(tmp_path / FILE_NAME)[0]
    assert record["kind"] == "train" and record["loss"] == 2.5 and record["learning_rate"] == 0.125
    assert record["mfu_full"] == pytest.approx(2 * record["mfu"]) and 0 < record["memory_bytes"] <= peak_memory_bytes(CPU)
    made.clock.read = MagicMock(side_effect=ValueError("clock"))  # type: ignore[method-assign]
    made.log(State(2, 20), torch.tensor(2.5), result(), 0.125)
    assert "the record failed (ValueError: clock)" in made.progress.line.call_args.args[0]  # type: ignore[attr-defined]


def test_loads_of_experts_are_in_the_record_and_in_those_of_the_layers(tmp_path: Path) -> None:
    made = session(tmp_path)
    made.checkpoints.complete = None
    made.start(State())
    loads = StepLoads((1,), torch.tensor([[3.0, 1.0]]))
    made.log(State(1, 10), torch.tensor(2.5), result().with_loads(loads), 0.125)
    train, experts = read_records(tmp_path / FILE_NAME)
    assert train["expert_load_max"] == 1.5 and experts["name"] == "layer-1" and experts["load"] == [0.75, 0.25]
    made.log(State(2, 20), torch.tensor(2.5), result(), 0.125)
    assert "expert_load_max" not in read_records(tmp_path / FILE_NAME)[2]


def test_a_step_begins_with_its_number_and_the_profile(tmp_path: Path) -> None:
    made = session(tmp_path, rewinds=[{"kind": "health", "step": step} for step in (3, 5)])
    made.start(State(4))
    assert made.heartbeat.update == 4 and [record["step"] for record in read_records(tmp_path / FILE_NAME)] == [5]
    made.begin_update(State(4))
    assert made.heartbeat.update == 5 and made.profile.before.call_args.args == (4,)  # type: ignore[attr-defined]


def test_a_checkpoint_gives_the_state_and_what_was_remembered_or_the_weights_alone() -> None:
    engine, checkpoints = MagicMock(), MagicMock()
    checkpoints.load.return_value = CheckpointMeta(8, 80, extra={"batch": 9, "health": {"losses": [1.0]}})
    assert restore(engine, checkpoints, "step-8") == (State(8, 80, 9), {"losses": [1.0]})
    engine.loaded.assert_called_with(8)
    checkpoints.load.return_value = CheckpointMeta(8, 80, extra={"losses": [2.0]})
    assert restore(engine, checkpoints, "step-8") == (State(8, 80, 8), {"losses": [2.0]}), "of an older tiglon"
    restore_weights(engine, checkpoints, "step-8")
    engine.loaded.assert_called_with(0)
    only = checkpoints.load.call_args.kwargs["only"]
    assert only("weight/a") and not only("momentum/a")


def test_what_an_engine_calls_in_the_middle_of_a_step() -> None:
    checkpoints, clock, stop = MagicMock(), MagicMock(), MagicMock()
    hooks = step_hooks(stop, checkpoints, clock)
    hooks.mark("forward")
    assert hooks.leave() is stop.requested.return_value and stop.requested.call_args.kwargs == {"wait": False}
    checkpoints.wait_for_copy.return_value = False
    hooks.before_state_changes()
    assert checkpoints.wait_for_copy.call_args.args == ("accumulate",)
    assert [call.args for call in clock.mark.call_args_list] == [("forward",)], "nothing was waited for"
    checkpoints.wait_for_copy.return_value = True
    hooks.before_state_changes()
    assert clock.mark.call_args.args == ("save",)
    made = session(checkpoints=checkpoints, clock=clock)
    made.wait_for_checkpoint_copy()
    assert checkpoints.wait_for_copy.call_args.args == ("update",)
