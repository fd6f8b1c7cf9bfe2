"""The state of a run, and when something is due."""

from trainer.state import State, due


def test_an_update_advances_step_tokens_and_batch():
    state = State(step=3, tokens=300, batch=5).after(100)
    assert state == State(4, 400, 6)
    assert state.with_batch(9) == State(4, 400, 9)


def test_due_every_so_many_steps_and_never_at_zero():
    assert [step for step in range(1, 8) if due(step, 3)] == [3, 6]
    assert not any(due(step, 0) for step in range(8))
