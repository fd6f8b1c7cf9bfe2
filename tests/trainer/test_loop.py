"""The loop calls the operations of a session in their order, and ends where it should."""

from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from trainer.loop import train
from trainer.session import RunEnded
from trainer.state import State


def session(steps: int = 4, log: int = 2, replicas: int = 0, checkpoint: int = 2) -> MagicMock:
    """A session that does nothing, counts one token per update and finds every step healthy."""
    made = MagicMock(name="session")
    made.settings = SimpleNamespace(
        train=SimpleNamespace(steps=steps), log=SimpleNamespace(every_steps=log),
        health=SimpleNamespace(replica_check_every_steps=replicas), checkpoint=SimpleNamespace(every_steps=checkpoint),
    )  # fmt: skip
    made.evaluate_first = False
    made.stop.requested.return_value = False
    made.handle_data_change.side_effect = lambda state: state
    made.check_health.side_effect = lambda state: state
    made.is_spike.return_value = False
    made.after.side_effect = lambda state: state.after(1)
    return made


def steps_of(operation: Any) -> list[int]:
    return [call.args[0].step for call in operation.call_args_list]


def test_a_whole_run() -> None:
    made = session(replicas=3)
    state, saved = train(made, State())
    assert state == State(4, 4, 4) and saved is made.save_final.return_value
    assert steps_of(made.log) == [1, 2, 4], "the first, every second, the last"
    assert steps_of(made.save) == [2, 4] and steps_of(made.compare_replicas) == [3]
    assert steps_of(made.run_evaluations) == [1, 2, 3, 4] and steps_of(made.save_final) == [4]
    assert [call.args[1] for call in made.run_evaluations.call_args_list] == [False, False, False, True]
    assert [call.args[0] for call in made.batches.call_args_list] == [0, 1, 2, 3]
    assert steps_of(made.begin_update) == [0, 1, 2, 3]
    assert steps_of(made.finish_update) == [1, 2, 3, 4] and steps_of(made.start) == [0]


def test_the_save_comes_before_the_evaluations_and_the_update_after_the_copy() -> None:
    made = session(steps=1)
    train(made, State())
    names = [name for name, _, _ in made.mock_calls]
    order = ["engine.accumulate", "is_spike", "wait_for_checkpoint_copy", "engine.update", "check_health"]
    order += ["finish_update", "log", "save"]
    positions = [names.index(name) for name in [*order, "run_evaluations", "save_final"]]
    assert positions == sorted(positions)


@pytest.mark.parametrize("stopped", ["between steps", "between micro-batches"])
def test_a_stop_ends_the_run_with_a_save_of_the_state_reached(stopped: str) -> None:
    made = session()
    if stopped == "between steps":
        made.stop.requested.side_effect = [False, False, True]
    else:
        made.engine.accumulate.side_effect = [1.0, 1.0, None]
    state, _ = train(made, State())
    assert state.step == 2 and made.engine.update.call_count == 2 and steps_of(made.save_final) == [2]


def test_a_rewind_makes_the_steps_again() -> None:
    """Found with the step after, and before a save."""
    made, rewinds = session(steps=4), iter([State(2, 2, 3)])
    made.check_health.side_effect = lambda state: next(rewinds, state) if state.step == 3 else state
    state, _ = train(made, State())
    assert state == State(4, 4, 5) and [call.args[0] for call in made.batches.call_args_list] == [0, 1, 2, 3, 4]
    assert steps_of(made.save) == [2, 4] and steps_of(made.finish_update) == [1, 2, 3, 4], "what was undone is not checked"
    made, seen = session(steps=2, checkpoint=1), list[State]()

    def rewind_before_the_save_of_step_2(state: State) -> State:
        seen.append(state)
        return State(0, 0, 2) if [old.step for old in seen] == [1, 1, 2, 2] else state

    made.check_health.side_effect = rewind_before_the_save_of_step_2
    assert train(made, State())[0] == State(2, 2, 4) and steps_of(made.save) == [1, 1, 2]


def test_a_resumed_run_repeats_evaluations_and_an_error_ends_it() -> None:
    made = session(steps=4)
    made.evaluate_first = True
    train(made, State(4, 4, 4))
    assert steps_of(made.run_evaluations) == [4] and made.run_evaluations.call_args.kwargs == {"last": True}
    made = session()
    made.compare_replicas.side_effect = RunEnded("step 1: replicas differ")
    made.settings.health.replica_check_every_steps = 1
    with pytest.raises(RunEnded, match="replicas differ"):
        train(made, State())
    assert not made.save_final.called
