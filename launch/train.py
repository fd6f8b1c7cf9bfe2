"""Train on one rank: `torchrun ... -m launch.train CONFIG [section.key=value ...]`. The composition root.

`main` checks everything that can be checked before it writes a file or starts a process group (launch/inputs.py). `train_rank`
then shows the order of the rest: meet the other ranks, find the checkpoint to resume from (launch/resume_source.py), build the
session (launch/session.py), train (trainer/loop.py). A mistake of the user's is one sentence and exit status 2.
"""

import sys
import traceback
from contextlib import ExitStack
from functools import partial

from data.storage import open_store
from launch import program, runtime
from launch.batches import batch_sizes
from launch.engine import join_ranks
from launch.exit_status import Status
from launch.inputs import RankInputs, check_inputs
from launch.interrupts import interrupts_end_at_once
from launch.load_config import load_config
from launch.resume_source import find_source
from launch.run_end import BEFORE_TRAINING, FailureWatch, RunEnd, Stage, clear_failure, first_failure
from launch.session import RankContext, build_session
from launch.stop import record_stop, stop_signal
from trainer.checkpoint.api import Checkpoints, SavedCheckpoint
from trainer.loop import train
from trainer.monitoring.progress import Progress
from trainer.monitoring.watchdog import Heartbeat
from trainer.state import State

USAGE = "usage: torchrun --nproc-per-node G -m launch.train CONFIG [section.key=value ...]"


def main(arguments: list[str] | None = None) -> int:
    """Run one rank; its exit status (launch/exit_status.py)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    ending = RunEnd(runtime.ALONE)
    try:
        world = runtime.world()
        ending = RunEnd(world)
        if arguments and arguments[0] in ("-h", "--help"):
            print(USAGE)
            return Status.DONE
        if not arguments:
            raise ValueError(USAGE)
        if world.elastic:
            runtime.die_with_parent()
        with interrupts_end_at_once(BEFORE_TRAINING if world.rank == 0 else ""):
            inputs = check_inputs(load_config(arguments[0], arguments[1:], settled=False), world)
        output = runtime.RedirectedOutput()
        ending = RunEnd(world, output.screen, inputs.directory, partial(output.to_log, inputs.log))
        return run_rank(inputs, ending, output)
    except KeyboardInterrupt:
        return ending.interrupted()
    except program.USERS as error:
        return ending.mistake(error)
    except Exception as error:
        return ending.failed(error)


def run_rank(inputs: RankInputs, ending: RunEnd, output: runtime.RedirectedOutput) -> int:
    """Train with the output of libraries kept off the screen, and close everything; the exit status.

    Raises:
        ValueError, FileNotFoundError, PermissionError: a mistake of the user's, found before training began.
    """
    status: Status | None = None
    try:
        with ExitStack() as resources:
            status = train_rank(inputs, ending, output, resources)
    except Exception:
        if status is None:
            raise
        traceback.print_exc()  # to the rank's log: what cannot be closed does not change how the run has ended
    for stream in (sys.stdout, sys.stderr):  # the rank's log, whose disk may be full
        program.discard_unwritable(stream)
    return status


def train_rank(inputs: RankInputs, ending: RunEnd, output: runtime.RedirectedOutput, resources: ExitStack) -> Status:
    """Meet the others, build the session and train; how it ended. Raises as `run_rank`."""
    context = meet_ranks(inputs, ending, output, resources)
    checkpoints, progress, config = context.checkpoints, context.progress, inputs.config
    source = find_source(config.checkpoint, config.run.dir, inputs.world, checkpoints)
    output.to_log(inputs.log)
    if inputs.world.rank == 0:
        report_restart(context)
    checkpoints.broadcast(None)  # all ranks are here: from now on nobody reads an earlier start's failure
    ending.reach(Stage.HELD)
    resources.enter_context(FailureWatch(ending, inputs.world, checkpoints.drain))
    try:
        session, state = build_session(context, source)
        ending.begin(session)
        state, saved = train(session, state)
        progress.close()  # so that what follows is the last line
        status = finish(context, state, saved)
    except Exception as error:
        progress.close()
        status = ending.failed(error)
    context.stop.over()
    return status


def meet_ranks(
    inputs: RankInputs, ending: RunEnd, output: runtime.RedirectedOutput, resources: ExitStack
) -> RankContext:  # fmt: skip
    """Start the process groups, the stop signal, the screen and the checkpoints, which lock the run directory."""
    config, world = inputs.config, inputs.world
    resources.callback(runtime.leave_process_group)
    stop = resources.enter_context(stop_signal(config.health.grace_seconds, ending, reports=world.rank == 0))
    mesh = join_ranks(config, world, inputs.device)
    screen, sizes = output.screen if world.rank == 0 else None, batch_sizes(config.train)

    def tokens_before(batch: int) -> int:
        return sizes.before(batch) * config.train.sequence_length

    progress = resources.enter_context(Progress(config.train.steps, tokens_before, screen))
    directory, heartbeat = inputs.directory / "checkpoints", Heartbeat()
    checkpoints = Checkpoints(open_store, directory, config.checkpoint, mesh.world.group, progress.line, heartbeat.beat)
    resources.callback(checkpoints.close)
    ending.reach(Stage.LOCKED)
    return RankContext(inputs, mesh, progress, stop, heartbeat, checkpoints, ending, resources)


def report_restart(context: RankContext) -> None:
    """Say why torchrun has started the ranks again, and forget the failure of the earlier start."""
    if restarts := context.inputs.world.restarts:
        why = context.inputs.world.lost or first_failure(context.inputs.directory) or "a rank was killed"
        context.progress.line(f"the ranks were started again (restart {restarts}): {why}")
    clear_failure(context.inputs.directory)


def finish(context: RankContext, state: State, saved: SavedCheckpoint) -> Status:
    """Show the last line of a run whose state is saved: done or stopped."""
    config, world = context.inputs.config, context.inputs.world
    context.ending.complete(state.step, saved.path)
    if state.step < config.train.steps:
        how = "checkpoint.resume=auto resumes" if config.checkpoint.resume == "never" else "the same command resumes"
        sentence = f"stopped by {context.stop.requested} at step {state.step}; saved in {saved.path}; {how}"
        if world.rank == 0:
            record_stop(context.inputs.directory, sentence)
        context.progress.line(sentence)
        return Status.DONE if world.elastic else Status.STOPPED
    past = f"is at step {state.step}, past" if state.step > config.train.steps else "has"
    every = "its only step" if config.train.steps == 1 else f"all {config.train.steps:,} steps"
    context.progress.line(f"done: {config.run.dir} {past} {every}; saved in {saved.path}")
    return Status.DONE


if __name__ == "__main__":
    program.run(main)
