"""Build the session of one rank: every part that the training loop uses, and the state that it starts from."""

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from data.corpus.stream import Stream
from data.storage import replace_file
from launch.checkpoints import read_meta
from launch.config import RunConfig
from launch.engine import build_engine
from launch.inputs import RankInputs
from launch.isolation import ObservationRunner, recorded_observations
from launch.observers import make_diagnostic, make_evaluator
from launch.preflight import memory_remark
from launch.resolve import config_toml, resolve
from launch.resume import CONFIG_FILE, filled, read_lineage, refuse_foreign, resume_differences, take_directory
from launch.resume_source import ResumeSource
from launch.run_end import RunEnd, record_failure
from launch.stop import clear_stop
from launch.summary import peak_flops, start_summary
from model.flops import flops_per_token
from model.parallel.mesh import Mesh
from trainer.checkpoint.api import Checkpoints
from trainer.checkpoint.manifest import CheckpointMeta
from trainer.engines.base import Engine
from trainer.engines.fold import Fold
from trainer.engines.zero import Zero
from trainer.monitoring.clock import Clock
from trainer.monitoring.health import Health
from trainer.monitoring.metrics import Metrics
from trainer.monitoring.profile import Profile
from trainer.monitoring.progress import Progress
from trainer.monitoring.signals import StopSignal
from trainer.monitoring.watchdog import Watchdog
from trainer.optimizers.step import remarks
from trainer.session import LoopConfig, Session
from trainer.state import State


@dataclass(frozen=True)
class RankContext:
    """One rank once it has met the others and holds the run directory's lock."""

    inputs: RankInputs
    mesh: Mesh
    progress: Progress
    stop: StopSignal
    checkpoints: Checkpoints
    ending: RunEnd
    resources: ExitStack
    """Closes what the rank opens, last first."""

    @property
    def directory(self) -> Path:
        """run.dir."""
        return Path(self.inputs.config.run.dir)

    @property
    def log(self) -> Path:
        """The log of this rank."""
        return self.directory / "logs" / f"rank-{self.inputs.world.rank}.log"


def build_session(context: RankContext, source: ResumeSource) -> tuple[Session, State]:
    """The session and the state that it starts from. The run directory is changed by `_take_directory` for the first time."""
    inputs, checkpoints = context.inputs, context.checkpoints
    meta = read_meta(source.path) if source.path else None
    _check_source(context, source, meta)
    acting = resolve(inputs.config, context.mesh.world.size, context.mesh.device)
    engine = build_engine(acting, context.mesh, context.mesh.world.size)
    context.resources.callback(engine.close)
    _show_start(context, acting, engine)
    session = _assemble(context, engine)
    state = _restore(context, session, source)
    _take_directory(context, acting, source, meta)
    _open_records(context, session, state)
    _add_observers(context, session, state, source.same_run)
    checkpoints.reserve(engine.shards())
    session.start(state, session.source)
    checkpoints.complete_is_stale = not source.same_run
    return session, state


def _check_source(context: RankContext, source: ResumeSource, meta: CheckpointMeta | None) -> None:
    """Refuse a checkpoint of another model or corpus; say what has changed since it was saved."""
    inputs, show = context.inputs, context.progress.line
    if meta is not None:
        refuse_foreign(source.path, meta, inputs.config, None if source.weights_only else inputs.data.train.fingerprint)
        for line in resume_differences(inputs.asked, inputs.config, meta, source.path, source.weights_only):
            show(line)
    if source.remark:
        show(source.remark)


def _show_start(context: RankContext, acting: RunConfig, engine: Engine) -> None:
    inputs = context.inputs
    config = inputs.config
    lines = [*start_summary(config, context.mesh, engine), *remarks(config.optimizer, config.model)]
    for line in [*lines, *inputs.data.remarks(config), memory_remark(acting, inputs.world, context.mesh.device)]:
        if line:
            context.progress.line(line)


def _assemble(context: RankContext, engine: Engine) -> Session:
    """The session without its records and observers, which need the run directory (`_open_records`, `_add_observers`)."""
    config, data, mesh, progress = context.inputs.config, context.inputs.data, context.mesh, context.progress

    def report_hang(sentence: str) -> None:  # rank 0 may be the one that cannot speak
        record_failure(context.directory, f"rank {mesh.world.rank}: {sentence}")
        context.ending.say(f"{sentence}; {context.checkpoints.describe_newest()}")

    engine.clock = clock = Clock(mesh.device)
    causal, full = (flops_per_token(config.model, config.train.sequence_length, causal) for causal in (True, False))
    session = Session(
        settings=LoopConfig(**{name: getattr(config, name) for name in LoopConfig.__dataclass_fields__}),
        engine=engine,
        mesh=mesh,
        batches=data.train.batches,
        evaluate=lambda state: None,
        diagnose=lambda state: None,
        checkpoints=context.checkpoints,
        metrics=Metrics(replace_file, None, False, "", {}),
        progress=progress,
        health=Health(config.health),
        watchdog=context.resources.enter_context(Watchdog(config.health.hang_seconds, context.log, report_hang)),
        profile=context.resources.enter_context(Profile(config.profile, context.directory, mesh.world.rank, progress.line)),
        clock=clock,
        stop=context.stop,
        meta=partial(_checkpoint_meta, config, mesh, data.train),
        flops_per_token=(causal, full),
        peak_flops=peak_flops(mesh.device, config.train.precision) * mesh.world.size,
        data_changes=[phase.from_step for phase in config.data.curriculum],
    )
    context.checkpoints.heartbeat = lambda: session.watchdog.beat(session.current_update)
    _connect(engine, session)
    return session


def _connect(engine: Engine, session: Session) -> None:
    """Let the engine ask the session in the middle of a step."""
    if isinstance(engine, Zero):  # fold's momentum holds part of an unfinished step already, so fold finishes the step
        engine.leave = partial(session.stop_requested, wait=False)
    elif isinstance(engine, Fold):
        engine.before_backward = partial(session.wait_for_checkpoint_copy, steady=False)


def _checkpoint_meta(config: RunConfig, mesh: Mesh, stream: Stream, state: State, extra: dict[str, Any]) -> CheckpointMeta:
    return CheckpointMeta(
        step=state.step,
        tokens=state.tokens,
        config=filled(config.model_dump(mode="json")),
        fingerprints={"corpus": stream.fingerprint, "tokenizer": stream.tokenizer_fingerprint},
        versions={name: version(name) for name in ("tiglon", "torch", "deepspeed", "megatron-core")},
        world={
            "tensor_parallel_size": mesh.tensor.size,
            "data_parallel_size": mesh.data.size,
            "engine": config.parallel.engine,
            "zero_stage": config.parallel.zero_stage,
        },
        extra={"batch": state.batch, **extra},
    )


def _restore(context: RankContext, session: Session, source: ResumeSource) -> State:
    """Fill the engine from the checkpoint, if there is one; the state that the run starts from."""
    if not source.path:
        return State()
    state = session.restore(source.path, weights_only=source.weights_only)
    session.source = "" if source.weights_only else source.path
    context.progress.line(f"{'weights from' if source.weights_only else 'resumed from'} {source.path}: step {state.step}")
    return state


def _take_directory(context: RankContext, acting: RunConfig, source: ResumeSource, meta: CheckpointMeta | None) -> None:
    """Make the run directory this run's: half-written checkpoints, RUN/stopped and another run's records go."""
    inputs, directory, lineage = context.inputs, context.directory, context.checkpoints.lineage
    context.ending.directory_changed = True
    context.checkpoints.begin()
    if context.mesh.world.rank:
        return
    clear_stop(directory)
    before = read_lineage(str(directory)) or (lineage.record() if source.same_run else None)
    superseded = take_directory(str(directory), lineage, inputs.world, before, None if source.weights_only else meta)
    if superseded:
        context.progress.line(f"the records of an earlier run in {directory} are now in {superseded}")
    replace_file(directory / CONFIG_FILE, config_toml(inputs.asked, acting, context.mesh).encode())


def _open_records(context: RankContext, session: Session, state: State) -> None:
    config = context.inputs.config
    directory = None if context.mesh.world.rank else context.directory
    session.metrics = Metrics(
        replace_file,
        directory,
        config.log.tensorboard,
        config.log.wandb,
        config.model_dump(mode="json"),
        state.step,
        context.progress.line,
    )
    context.resources.callback(session.metrics.close)
    session.record_rewinds(state.step)


def _add_observers(context: RankContext, session: Session, state: State, same_run: bool) -> None:
    config, first = context.inputs.config, context.mesh.world.rank == 0
    runner = ObservationRunner(session)
    recorded = recorded_observations(state.step, session.metrics.last) if first else None
    runner.recorded = context.checkpoints.broadcast(recorded)
    session.evaluate_first = same_run
    session.evaluate = make_evaluator(config, session, context.inputs.data.validation, runner)
    session.diagnose = make_diagnostic(session, runner)
