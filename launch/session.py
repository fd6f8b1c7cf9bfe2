"""Build the session of one rank: every part that the training loop uses, and the state that it starts from."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

from data.corpus.stream import Stream
from data.storage import replace_file
from data.tokenizer.tokenizer import Tokenizer
from launch.batches import ahead, row_lengths
from launch.checkpoints import read_meta
from launch.config import RunConfig
from launch.config_checks import optimized
from launch.engine import build_engine
from launch.inputs import RankInputs
from launch.isolation import ObservationRunner, recorded_observations
from launch.observers import Observers
from launch.preflight import memory_remark
from launch.resolve import config_toml, resolve
from launch.resume import CONFIG_FILE, reached, read_lineage, refuse_foreign, resume_differences, take_directory
from launch.resume_source import ResumeSource
from launch.run_end import RunEnd, Stage, record_failure
from launch.stop import clear_stop
from launch.summary import peak_flops, start_summary
from model.flops import flops_per_token
from model.parallel.mesh import Mesh
from trainer.checkpoint.api import Checkpoints, SavedCheckpoint
from trainer.checkpoint.manifest import CheckpointMeta
from trainer.engines.base import Engine
from trainer.monitoring.clock import Clock
from trainer.monitoring.health import Health
from trainer.monitoring.metrics import Metrics
from trainer.monitoring.profile import Profile
from trainer.monitoring.progress import Progress
from trainer.monitoring.signals import StopSignal, StopVote
from trainer.monitoring.watchdog import Heartbeat, Watchdog
from trainer.optimizers.check import remarks
from trainer.session import LoopConfig, Session, restore, restore_weights, step_hooks
from trainer.state import State


@dataclass(frozen=True)
class RankContext:
    """One rank once it has met the others and holds the run directory's lock."""

    inputs: RankInputs
    mesh: Mesh
    progress: Progress
    stop: StopSignal
    heartbeat: Heartbeat
    checkpoints: Checkpoints
    ending: RunEnd
    resources: ExitStack
    """Closes what the rank opens, last first."""


def build_session(context: RankContext, source: ResumeSource) -> tuple[Session, State]:
    """The session and the state that it starts from. The run directory is changed by `_take_directory` for the first time."""
    inputs, mesh, checkpoints = context.inputs, context.mesh, context.checkpoints
    meta = read_meta(source.path) if source.path else None
    _check_source(context, source, meta)
    begun = reached(meta, source.weights_only)
    acting = resolve(inputs.config, mesh.world.size, mesh.device, begun)
    clock, stop = Clock(mesh.device), StopVote(context.stop, mesh)
    engine = build_engine(ahead(acting, begun), mesh, step_hooks(stop, checkpoints, clock))
    context.resources.callback(engine.close)
    _show_start(context, acting, engine, begun)
    context.resources.enter_context(_watchdog(context))
    state, remembered = _restore(context, engine, source)
    _take_directory(context, acting, source, meta)
    metrics = _open_records(context, state)
    observers = _observers(context, engine, metrics, clock, stop, state)
    session = _assemble(context, engine, observers, stop, source, remembered)
    checkpoints.reserve(engine.shards())
    checkpoints.continue_from(SavedCheckpoint(state.step, session.source) if session.source else None, source.same_run)
    return session, state


def _check_source(context: RankContext, source: ResumeSource, meta: CheckpointMeta | None) -> None:
    """Refuse a checkpoint of another model or corpus; say what has changed since it was saved."""
    inputs, show = context.inputs, context.progress.line
    if meta is not None:
        refuse_foreign(source.path, meta, inputs.config, None if source.weights_only else inputs.data.train)
        for line in resume_differences(inputs.asked, inputs.config, meta, source.path, source.weights_only):
            show(line)
    if source.remark:
        show(source.remark)


def _show_start(context: RankContext, acting: RunConfig, engine: Engine, begun: State) -> None:
    inputs = context.inputs
    config, left = inputs.config, ahead(acting, begun)
    said = config.model.remarks() + remarks(*optimized(config), config.train.sequence_length)
    lines = [*inputs.asked.renamed, *start_summary(config, context.mesh, engine, begun), *said]
    for line in [*lines, *inputs.data.remarks(config, begun), memory_remark(left, inputs.world, context.mesh.device)]:
        if line:
            context.progress.line(line)


def _watchdog(context: RankContext) -> Watchdog:
    def report_hang(sentence: str) -> None:  # rank 0 may be the one that cannot speak
        record_failure(context.inputs.directory, f"rank {context.inputs.world.rank}: {sentence}")
        context.ending.say(f"{sentence}; {context.checkpoints.describe_newest()}")

    inputs = context.inputs
    hang_seconds = inputs.config.health.hang_seconds if context.ending.ends_process else 0
    return Watchdog(hang_seconds, context.heartbeat, inputs.log, report_hang)


def _assemble(
    context: RankContext, engine: Engine, observers: Observers, stop: StopVote, source: ResumeSource,
    remembered: Mapping[str, Any],
) -> Session:  # fmt: skip
    inputs, mesh, progress = context.inputs, context.mesh, context.progress
    config, data = inputs.config, inputs.data
    health = Health(config.health)
    health.resume(remembered)
    lengths = row_lengths(config.train)
    causal, full = ({n: flops_per_token(config.model, n, causal) for n in lengths.each} for causal in (True, False))
    return Session(
        settings=LoopConfig(**{name: getattr(config, name) for name in LoopConfig.__dataclass_fields__}),
        engine=engine,
        mesh=mesh,
        batches=data.train.batches,
        batch_tokens=data.train.tokens,
        evaluate=observers.evaluate,
        diagnose=observers.diagnose,
        decompose=observers.decompose,
        checkpoints=context.checkpoints,
        metrics=observers.metrics,
        progress=progress,
        health=health,
        heartbeat=context.heartbeat,
        profile=context.resources.enter_context(Profile(config.profile, inputs.directory, mesh.world.rank, progress.line)),
        clock=observers.clock,
        stop=stop,
        meta=partial(_checkpoint_meta, config, mesh, data.train),
        flops_per_token=lambda batch: (causal[lengths.of(batch)], full[lengths.of(batch)]),
        peak_flops=peak_flops(mesh.device, config.train.precision) * mesh.world.size,
        data_changes=[*(phase.from_step for phase in config.data.curriculum), *(until for until, _ in lengths.ramp)],
        source="" if source.weights_only else source.path,
        rewinds=list(remembered.get("later_rewinds", [])),
        evaluate_first=source.same_run,
    )


def _checkpoint_meta(config: RunConfig, mesh: Mesh, stream: Stream, state: State, extra: dict[str, Any]) -> CheckpointMeta:
    return CheckpointMeta(
        step=state.step,
        tokens=state.tokens,
        config=config.model_dump(mode="json"),
        fingerprints={"corpus": stream.fingerprint, "tokenizer": stream.tokenizer_fingerprint},
        versions={name: version(name) for name in ("tiglon", "torch", "deepspeed", "megatron-core")},
        world={
            "tensor_parallel_size": mesh.tensor.size,
            "context_parallel_size": mesh.context.size,
            "data_parallel_size": mesh.data.size,
            "pipeline_parallel_size": mesh.pipeline.size,
            "expert_parallel_size": mesh.experts.size,
            "engine": config.parallel.engine,
            "zero_stage": config.parallel.zero_stage,
        },
        extra={"batch": state.batch, "data_plan": stream.plan().record(), **extra},
    )


def _restore(context: RankContext, engine: Engine, source: ResumeSource) -> tuple[State, Mapping[str, Any]]:
    """Fill the engine from the checkpoint, if there is one; the state that the run starts from, and what it remembers."""
    state, remembered = State(), {}
    if not source.path:
        return state, remembered
    if source.weights_only:
        restore_weights(engine, context.checkpoints, source.path)
    else:
        state, remembered = restore(engine, context.checkpoints, source.path)
    context.progress.line(f"{'weights from' if source.weights_only else 'resumed from'} {source.path}: step {state.step}")
    return state, remembered


def _take_directory(context: RankContext, acting: RunConfig, source: ResumeSource, meta: CheckpointMeta | None) -> None:
    """Make the run directory this run's: half-written checkpoints, RUN/stopped and another run's records go."""
    inputs, directory, lineage = context.inputs, context.inputs.directory, context.checkpoints.lineage
    context.ending.reach(Stage.CHANGED)
    context.checkpoints.begin()
    if context.mesh.world.rank:
        return
    clear_stop(directory)
    before = read_lineage(str(directory)) or (lineage.record() if source.same_run else None)
    superseded = take_directory(str(directory), lineage, inputs.world, before, None if source.weights_only else meta)
    if superseded:
        context.progress.line(f"the records of an earlier run in {directory} are now in {superseded}")
    replace_file(
        directory / CONFIG_FILE, config_toml(inputs.asked, acting, context.mesh, reached(meta, source.weights_only)).encode()
    )


def _open_records(context: RankContext, state: State) -> Metrics:
    config = context.inputs.config
    metrics = Metrics(
        replace_file,
        None if context.mesh.world.rank else context.inputs.directory,
        config.log,
        config.model_dump(mode="json"),
        state.step,
        context.progress.line,
    )
    context.resources.callback(metrics.close)
    return metrics


def _observers(
    context: RankContext, engine: Engine, metrics: Metrics, clock: Clock, stop: StopVote, state: State
) -> Observers:  # fmt: skip
    config, mesh, data = context.inputs.config, context.mesh, context.inputs.data
    recorded = recorded_observations(state.step, metrics.last) if mesh.world.rank == 0 else None
    recorded = context.checkpoints.broadcast(recorded)
    return Observers(
        config=config,
        model=engine.model,
        fragments=engine.fragments,
        mesh=mesh,
        batches=data.train.batches,
        validation=data.validation,
        tokenizer=Tokenizer.load(config.data.tokenizer) if config.log.sample_prompt else None,
        metrics=metrics,
        progress=context.progress,
        heartbeat=context.heartbeat,
        stop=stop,
        clock=clock,
        runner=ObservationRunner(mesh.world, context.progress.line, context.stop, recorded),
    )
