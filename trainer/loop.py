"""The training loop."""

from trainer.checkpoint.api import SavedCheckpoint
from trainer.session import Session
from trainer.state import State, due


def train(session: Session, state: State) -> tuple[State, SavedCheckpoint]:
    """Train until the last step or a stop signal; the state reached, and the checkpoint that holds it.

    Raises:
        RunEnded: in one sentence, why the run cannot continue or the state reached cannot be saved.
    """
    settings = session.settings
    session.start(state)
    if session.evaluate_first and state.step:
        session.run_evaluations(state, last=state.step == settings.train.steps)
    while state.step < settings.train.steps and not session.stop.requested():
        state = session.handle_data_change(state)
        session.begin_update(state)
        learning_rate = session.learning_rate(state)
        batches = session.batches(state.batch)
        session.clock.mark("data")
        loss = session.engine.accumulate(batches)
        if loss is None:  # a stop was requested between two micro-batches: the unfinished step has changed nothing
            break
        left_out = session.is_spike(state, loss)
        session.wait_for_checkpoint_copy()
        update = session.engine.update(learning_rate, left_out)
        session.clock.mark("optimizer")
        before, state = state, session.check_health(session.after(state))  # the loss of the step before
        if state.step <= before.step:
            continue  # the health rules went back to a checkpoint
        session.finish_update(state, loss, update, left_out)
        last = state.step == settings.train.steps
        if due(state.step, settings.log.every_steps) or last or state.step == 1:
            session.log(state, loss, update, learning_rate)
        if due(state.step, settings.health.replica_check_every_steps):
            session.compare_replicas(state)
        if due(state.step, settings.checkpoint.every_steps) or last:
            reached, state = state, session.check_health(state)
            if state.step < reached.step:
                continue  # this very step was a spike, and the health rules went back
            session.save(state)  # before the evaluations: one that fails then loses nothing
        session.run_evaluations(state, last)
    state = session.check_health(state)
    return state, session.save_final(state)
