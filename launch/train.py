"""Train: the composition root. `torchrun ... -m launch.train CONFIG [section.key=value ...]`.

Checks everything that can be checked before it writes a file or starts a process group, builds the parts, and starts
the loop. A mistake of the user's is one sentence and exit status 2.
"""

import os
import sys
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from data.stream import Stream
from data.validation import Validation
from launch import program, runtime
from launch.config import RunConfig, load, micro_batches
from launch.ending import Ending, FailureWatch, claim, first_failure, forget_failure, forget_stop, record_stop
from launch.looks import Looks, looked_at
from launch.network import network
from launch.observe import diagnoser, observer
from launch.resolve import config_toml, resolve
from launch.resume import (
    CONFIG_FILE,
    choose_start,
    differences,
    filled,
    read_life,
    refuse_foreign,
    take_directory,
)
from launch.start import begin, check_start, memory_remark
from launch.status import Status
from launch.summary import peak_flops, summary
from model.decoder import rms_floors
from model.flops import flops_per_token
from model.parallel import Topology, make_topology
from trainer.checkpoint import Checkpoints, Complete, find, read_meta
from trainer.clock import Clock
from trainer.engine import Engine
from trainer.fold import Fold
from trainer.health import Health
from trainer.loop import Run, Settings, train
from trainer.manifest import Meta
from trainer.metrics import Metrics
from trainer.optimizer import remarks
from trainer.profile import Profile
from trainer.progress import Progress, plural
from trainer.signals import LAST_WORD, StopSignal
from trainer.state import State
from trainer.store import replace_file
from trainer.watchdog import Watchdog
from trainer.zero import Zero

MANY = 4.0
"""Passes over a corpus after which repeated text is worth less than new one (Muennighoff and others 2023, arXiv 2305.16264)."""


@dataclass(frozen=True)
class Data:
    """What this rank reads."""

    train: Stream
    validation: Validation | None

    def close(self) -> None:
        """Let go of all files."""
        self.train.close()
        if self.validation is not None:
            self.validation.close()

    def remarks(self, config: RunConfig) -> list[str]:
        """What a reader of the losses should know, in sentences."""
        found = [
            f"data.train: '{path}' is read {times:.1f} times over in {plural(config.train.steps, 'update')}"
            for path, times in self.train.epochs(config.train.steps)
            if times > MANY
        ]
        return found + self._remarks_on_validation()

    def _remarks_on_validation(self) -> list[str]:
        if self.validation is None:
            return []
        learned = {corpus.manifest.fingerprint for corpus in self.train.samples.corpora}
        shared = [corpus.directory for corpus in self.validation.corpora if corpus.manifest.fingerprint in learned]
        found = [f"data.validation: '{path}' is also trained on, so its loss is not that of unseen text" for path in shared]
        return found + self.validation.remarks()


def main(arguments: list[str] | None = None) -> int:
    """Run one rank; its exit status (launch/status.py)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    ending = Ending(runtime.ALONE)
    try:
        here = runtime.world()
        ending = Ending(here)
        if not arguments or arguments[0] in ("-h", "--help"):
            raise ValueError("usage: torchrun --nproc-per-node G -m launch.train CONFIG [section.key=value ...]")
        if here.elastic:
            runtime.die_with_parent()
        asked = load(arguments[0], arguments[1:])
        begun = begin(asked, here)
        device = runtime.choose_device(begun.config.run.device, here)
        data = open_data(begun.config, here.rank, here.world_size, pin_memory=device.type == "cuda")
        check_start(begun, here, device, data.train)
        runtime.prepare_process(device, here, begun.config.run.deterministic)
        if program.interrupted():
            return ending.interrupted()
        return run_rank(asked, begun.config, here, device, data, ending)
    except KeyboardInterrupt:
        return ending.interrupted()
    except program.USERS as error:
        return ending.mistake(error)
    except Exception as error:
        return ending.failed(error)


def open_data(config: RunConfig, rank: int, world_size: int, pin_memory: bool = False) -> Data:
    """The training and validation text of this rank; `pin_memory` for a device that copies while it computes.

    Raises:
        ValueError, FileNotFoundError: the world fits no layout, or the data are not there or not ours.
    """
    micro_batches(config, world_size)
    size, train = config.parallel.tensor_parallel_size, config.train
    place = (rank // size, world_size // size)
    stream = Stream(
        config.data, "train", train.sequence_length, train.global_batch_size, train.micro_batch_size, *place,
        config.run.seed, pin_memory,
    )  # fmt: skip
    pieces = max(corpus.manifest.vocab_size for corpus in stream.samples.corpora)
    if pieces > config.model.vocab_size:
        raise ValueError(
            f"the tokenizer of the shards has {pieces} pieces, more than model.vocab_size = {config.model.vocab_size}; "
            "set model.vocab_size to at least that"
        )
    if not config.data.sources("validation"):
        return Data(stream, None)
    validation = Validation(
        config.data, train.sequence_length, train.micro_batch_size, config.evaluate.contexts, config.evaluate.tokens, *place
    )
    if validation.tokenizer_fingerprint != stream.tokenizer_fingerprint:
        raise ValueError("data.validation and data.train were made with different tokenizers: prepare them with the same one")
    return Data(stream, validation)


def run_rank(
    asked: RunConfig, config: RunConfig, here: runtime.World, device: torch.device, data: Data, ending: Ending
) -> int:  # fmt: skip
    """Build the parts and train; the exit status.

    Raises:
        ValueError, FileNotFoundError, PermissionError: a mistake of the user's, found before training began.
    """
    chatter = runtime.Chatter()
    ending.screen = chatter.screen
    status: Status | None = None
    try:
        with ExitStack() as stack:
            status = to_its_end(asked, config, here, device, data, ending, chatter, stack)
    except Exception:
        if status is None:
            raise
        traceback.print_exc()  # to the rank's log: what cannot be closed does not change how the run has ended
    for stream in (sys.stdout, sys.stderr):  # the rank's log, whose disk may be full
        program.let_go(stream)
    return status


def to_its_end(
    asked: RunConfig, config: RunConfig, here: runtime.World, device: torch.device, data: Data, ending: Ending,
    chatter: runtime.Chatter, stack: ExitStack,
) -> Status:  # fmt: skip
    """Join the others, build the parts, which `stack` closes, and train; how it ended. Raises as `run_rank`."""
    directory = Path(config.run.dir)
    log = directory / "logs" / f"rank-{here.rank}.log"
    stack.callback(runtime.leave)
    stop = stack.enter_context(stop_signal(config.health.grace_seconds, here.rank == 0, ending))
    topology = join(config, here, device)
    screen = chatter.screen if here.rank == 0 else None
    progress = stack.enter_context(Progress(config.train.steps, config.train.batch_tokens, screen))
    checkpoints = Checkpoints(
        str(directory / "checkpoints"), config.checkpoint, here.rank, here.world_size, topology.world_group, progress.line
    )
    stack.callback(checkpoints.close)
    ending.keep_log = partial(chatter.keep, log)
    source = find_source(config, here, checkpoints)
    chatter.keep(log)
    if here.rank == 0:
        if here.restarts:
            why = first_failure(directory) or "a rank was killed"
            progress.line(f"the ranks were started again (restart {here.restarts}): {why}")
        forget_failure(directory)
    ending.directory = checkpoints.agree(directory)  # from here on it is this run's, and nobody finds an earlier failure
    stack.enter_context(FailureWatch(ending, here, checkpoints.settle))
    try:
        run, state = build(asked, config, topology, data, checkpoints, source, progress, stop, ending, stack)
        ending.begin(
            lambda: f"step {run.at or state.step}", checkpoints.kept, checkpoints.settle,
            lambda: checkpoints.is_complete(run.at), lambda: checkpoints.is_complete(config.train.steps),
        )  # fmt: skip
        state, complete = train(run, state)
        progress.close()  # so that what follows is the last line
        status = ended(config, here, state, complete, stop, progress.line)
    except Exception as error:
        progress.close()
        status = ending.failed(error)
    stop.over()
    return status


def ended(
    config: RunConfig, here: runtime.World, state: State, complete: Complete, stop: StopSignal, say: Callable[[str], None]
) -> Status:  # fmt: skip
    """The last line of a run whose state is saved."""
    if state.step < config.train.steps:
        how = "checkpoint.resume=auto resumes" if config.checkpoint.resume == "never" else "the same command resumes"
        sentence = f"stopped by {stop.requested} at step {state.step}; saved in {complete.path}; {how}"
        if here.rank == 0:
            record_stop(Path(config.run.dir), sentence)
        say(sentence)
        return Status.DONE if here.elastic else Status.STOPPED
    past = f"is at step {state.step}, past" if state.step > config.train.steps else "has"
    say(f"done: {config.run.dir} {past} all {plural(config.train.steps, 'step')}; saved in {complete.path}")
    return Status.DONE


def stop_signal(grace_seconds: float, first: bool, ending: Ending) -> StopSignal:
    """What hears signals; rank 0 speaks for all."""

    def late() -> None:
        if first and not ending.saved():
            ending.say(
                f"{LAST_WORD * grace_seconds:g} s after the stop signal the run is not saved yet (health.grace_seconds = "
                f"{grace_seconds:g}); {ending.kept() or 'it has not begun'}"
            )

    def heard(name: str) -> None:
        if not first:
            return
        if ending.begun.is_set():
            ending.say(f"{name}: the run is about to end; a second {name} leaves at once")
        elif ending.finished():
            ending.say(f"{name}: all steps are done and saved, the last evaluation is finished; a second {name} leaves at once")
        else:
            ending.say(f"{name}: the run saves and leaves; a second {name} leaves at once, without saving")

    def leave(name: str) -> None:
        if first:
            ending.say(f"left at once by a second {name}; {ending.kept() or 'it had not begun'}")
        os._exit(Status.DONE if ending.finished() else Status.INTERRUPTED)

    return StopSignal(grace_seconds, late, heard, leave)


@dataclass(frozen=True)
class Source:
    """What a run goes on from."""

    path: str = ""
    """A checkpoint that was read and found intact; empty = from the beginning."""
    weights_only: bool = False
    own: bool = False
    """It was saved by this very run."""
    remark: str = ""


def find_source(config: RunConfig, here: runtime.World, checkpoints: Checkpoints) -> Source:
    """Which intact checkpoint to go on from; the life of `checkpoints` is the run's from here on.

    Raises:
        ValueError, FileNotFoundError: there should be one, and is none.
    """
    first = here.rank == 0
    start = choose_start(config.checkpoint, here, read_life(config.run.dir), checkpoints.lives()) if first else None
    start = checkpoints.agree(start)
    assert start is not None
    checkpoints.life = start.life
    if start.resumes and (path := checkpoints.newest()):
        return Source(path, own=True)
    others = checkpoints.agree(next((step for step, _ in checkpoints.lives()), 0) if first else 0)
    remark = (
        f"{checkpoints.address} holds checkpoints of another run, up to step {others}; they are left alone, or set aside where "
        "this one saves"
    )
    if not start.life.source:
        return Source(remark=remark if others else "")
    path = checkpoints.agree(find(start.life.source) if first else "")
    if fault := checkpoints.fault_of(path):
        raise ValueError(f"checkpoint.resume: {path} cannot be used: {fault}; give another one")
    return Source(path, start.life.weights_only, remark=remark if others else "")


def build(
    asked: RunConfig, config: RunConfig, topology: Topology, data: Data, checkpoints: Checkpoints, source: Source,
    progress: Progress, stop: StopSignal, ending: Ending, stack: ExitStack,
) -> tuple[Run, State]:  # fmt: skip
    """All parts, with the state that they begin with. The directory is changed here for the first time, and last."""
    here, first, directory = runtime.world(), topology.rank == 0, Path(config.run.dir)
    meta = read_meta(source.path) if source.path else None
    if meta is not None:
        refuse_foreign(source.path, meta, config, None if source.weights_only else data.train.fingerprint)
        for line in differences(asked, config, meta, source.path, source.weights_only):
            progress.line(line)
    if source.remark:
        progress.line(source.remark)
    acting = resolve(config, topology.world_size, topology.device)
    engine = engine_of(acting, topology, topology.world_size)
    stack.callback(engine.close)
    said = [*summary(config, topology, engine), *remarks(config.optimizer, config.model), *data.remarks(config)]
    for text in [*said, memory_remark(acting, here, topology.device)]:
        if text:
            progress.line(text)
    run = _parts(config, topology, engine, data, checkpoints, progress, stop, ending, stack)
    state = run.restore(source.path, weights_only=source.weights_only) if source.path else State()
    run.source = "" if source.weights_only else source.path
    if source.path:
        progress.line(f"{'weights from' if source.weights_only else 'resumed from'} {source.path}: step {state.step}")
    ending.changes = True
    checkpoints.begin()
    if first:
        forget_stop(directory)
        before = read_life(config.run.dir) or (checkpoints.life.record() if source.own else None)
        place = take_directory(config.run.dir, checkpoints.life, here, before, None if source.weights_only else meta)
        if place:
            progress.line(f"the records of an earlier run in {directory} are now in {place}")
        replace_file(directory / CONFIG_FILE, config_toml(asked, acting, topology).encode())
    run.metrics = Metrics(
        directory if first else None,
        config.log.tensorboard,
        config.log.wandb,
        config.model_dump(mode="json"),
        state.step,
        progress.line,
    )
    stack.callback(run.metrics.close)
    run.record_rewinds(state.step)
    looks = Looks(run)
    looks.done = checkpoints.agree(looked_at(state.step, run.metrics.last) if first else None)
    run.look_again = source.own
    run.evaluate = observer(config, run, data.validation, looks)
    run.diagnose = diagnoser(run, looks)
    checkpoints.reserve(engine.shards())
    run.start(state, run.source)
    checkpoints.outdated = not source.own
    return run, state


def join(config: RunConfig, here: runtime.World, device: torch.device) -> Topology:
    """Meet the other ranks and form the groups, all of them with parallel.timeout_seconds."""
    runtime.join(device, here, config.parallel.timeout_seconds)
    return make_topology(config.parallel.tensor_parallel_size, device, config.parallel.timeout_seconds)


def make_engine(config: RunConfig, topology: Topology, world_size: int) -> Engine:
    """The network behind the engine that a configuration asks for."""
    return engine_of(resolve(config, world_size, topology.device), topology, world_size)


def engine_of(acting: RunConfig, topology: Topology, world_size: int) -> Engine:
    """The network behind its engine, from a configuration whose choices are made (launch/resolve.py)."""
    model = network(acting, topology, acting.train.recompute)
    floors = rms_floors(model, acting.optimizer.rms_floor)
    match acting.parallel.engine:
        case "zero":
            count = micro_batches(acting, world_size)
            return Zero(model, acting.parallel, acting.optimizer, acting.train, topology, count, floors)
        case "fold":
            return Fold(
                model, acting.optimizer, topology, seed=acting.run.seed, rms_floor=floors,
                bucket_numbers=acting.parallel.reduce_bucket_numbers,
            )  # fmt: skip
        case _:
            raise ValueError(f"parallel.engine = '{acting.parallel.engine}'; legal: zero, fold")


def _parts(
    config: RunConfig, topology: Topology, engine: Engine, data: Data, checkpoints: Checkpoints,
    progress: Progress, stop: StopSignal, ending: Ending, stack: ExitStack,
) -> Run:  # fmt: skip
    """Everything the loop wants."""

    def report(sentence: str) -> None:  # of a hang: rank 0 may be the one that cannot speak
        claim(directory, f"rank {topology.rank}: {sentence}")
        ending.say(f"{sentence}; {checkpoints.kept()}")

    directory = Path(config.run.dir)
    log = directory / "logs" / f"rank-{topology.rank}.log"
    clock = Clock(topology.device)
    engine.clock = clock
    nobody = Metrics(None, False, "", {})
    sections = {name: getattr(config, name) for name in Settings.__dataclass_fields__}
    flops = tuple(flops_per_token(config.model, config.train.sequence_length, causal) for causal in (True, False))
    run = Run(
        settings=Settings(**sections),
        engine=engine,
        topology=topology,
        batches=data.train.batches,
        evaluate=lambda state: None,
        diagnose=lambda state: None,
        checkpoints=checkpoints,
        metrics=nobody,
        progress=progress,
        health=Health(config.health),
        watchdog=stack.enter_context(Watchdog(config.health.hang_seconds, log, report)),
        profile=stack.enter_context(Profile(config.profile, directory, topology.rank, progress.line)),
        clock=clock,
        stop=stop,
        meta=lambda state, own: _meta(config, topology, data.train, state, own),
        flops_per_token=(flops[0], flops[1]),
        peak_flops=peak_flops(topology.device, config.train.precision) * topology.world_size,
        new_data=[phase.from_step for phase in config.data.curriculum],
    )
    checkpoints.beat = lambda: run.watchdog.beat(run.at)
    if isinstance(engine, Zero):  # fold's momentum holds part of an unfinished step already, so it finishes it
        engine.leave = partial(run.asked_to_stop, at_once=False)
    elif isinstance(engine, Fold):
        engine.before_backward = partial(run.release, steady=False)
    return run


def _meta(config: RunConfig, topology: Topology, stream: Stream, state: State, own: dict[str, Any]) -> Meta:
    return Meta(
        step=state.step,
        tokens=state.tokens,
        config=filled(config.model_dump(mode="json")),
        fingerprints={"corpus": stream.fingerprint, "tokenizer": stream.tokenizer_fingerprint},
        versions={name: version(name) for name in ("tiglon", "torch", "deepspeed", "megatron-core")},
        world={
            "tensor_parallel_size": topology.tensor_parallel_size,
            "data_parallel_size": topology.data_parallel_size,
            "engine": config.parallel.engine,
            "zero_stage": config.parallel.zero_stage,
        },
        extra={"batch": state.batch, **own},
    )


if __name__ == "__main__":
    sys.exit(program.run(main))
