"""Train: the composition root. `torchrun ... -m launch.train CONFIG [section.key=value ...]`.

Checks everything that can be checked before it writes a file or starts a process group, builds the parts, and starts
the loop. A mistake of the user's is one sentence and exit status 2.
"""

import sys
import traceback
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import torch

from data.stream import Stream
from data.validation import Validation
from launch import runtime
from launch.config import RunConfig, dump, load, micro_batches
from launch.looks import Looks
from launch.network import network
from launch.observe import diagnoser, observer
from launch.plan import choose_layout
from launch.resume import changes, rate_remark, refuse_foreign, source_of
from launch.start import check_start
from launch.summary import peak_flops, summary
from model.decoder import rms_floors
from model.flops import flops_per_token
from model.parallel import Topology, make_topology
from trainer.checkpoint import Checkpoints, find, read_meta
from trainer.clock import Clock
from trainer.engine import Engine
from trainer.fold import Fold
from trainer.health import Health
from trainer.loop import Run, RunEnded, Settings, train
from trainer.manifest import Meta
from trainer.metrics import Metrics
from trainer.optimizer import remarks
from trainer.profile import Profile
from trainer.progress import Progress, plural
from trainer.signals import LAST_WORD, StopSignal
from trainer.state import State
from trainer.watchdog import Watchdog
from trainer.zero import Zero


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

    def remarks(self) -> list[str]:
        """What a reader of the validation loss should know, in sentences."""
        if self.validation is None:
            return []
        learned = {corpus.manifest.fingerprint for corpus in self.train.samples.corpora}
        shared = [corpus.directory for corpus in self.validation.corpora if corpus.manifest.fingerprint in learned]
        found = [f"data.validation: '{path}' is also trained on, so its loss is not that of unseen text" for path in shared]
        return found + self.validation.remarks()


def main(arguments: list[str] | None = None) -> int:
    """Run one rank; the exit status: 0 done, 1 the run ended itself, 2 a mistake of the user's."""
    arguments = sys.argv[1:] if arguments is None else arguments
    here = runtime.world()
    screen: TextIO = sys.stderr
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            raise ValueError("usage: torchrun --nproc-per-node G -m launch.train CONFIG [section.key=value ...]")
        config = load(arguments[0], arguments[1:])
        device = runtime.choose_device(config.run.device, here)
        data = open_data(config, here.rank, here.world_size, pin_memory=device.type == "cuda")
        check_start(config, here, device, data.train)
        runtime.prepare_process(device, here)
        screen = runtime.divert_chatter(Path(config.run.dir) / "logs" / f"rank-{here.rank}.log")
        with ExitStack() as stack:
            stack.callback(runtime.leave)
            return run_rank(config, here, device, data, screen, stack)
    except (ValueError, FileNotFoundError, PermissionError) as error:
        return _say(screen, here.rank, error, 2)
    except (RunEnded, OSError) as error:
        return _say(screen, here.rank, error, 1)


def _say(screen: TextIO, rank: int, error: Exception, status: int) -> int:
    """The sentence goes to the screen (rank 0 speaks for mistakes that every rank makes), the traceback to the log."""
    if rank == 0 or status != 2:
        print(f"{'tiglon' if rank == 0 else f'tiglon, rank {rank}'}: {error}", file=screen, flush=True)
    if screen is not sys.stderr:
        with suppress(OSError):  # the log's disk may be the one that is full
            traceback.print_exc()
    return status


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


def run_rank(config: RunConfig, here: runtime.World, device: torch.device, data: Data, screen: TextIO, stack: ExitStack) -> int:
    """Build the parts and train."""
    first = here.rank == 0
    directory = Path(config.run.dir)
    runtime.join(device, here, config.parallel.timeout_seconds)
    topology = make_topology(config.parallel.tensor_parallel_size, device)
    progress = stack.enter_context(Progress(config.train.steps, config.train.batch_tokens, screen if first else None))
    checkpoints = Checkpoints(
        str(directory / "checkpoints"), config.checkpoint, here.rank, here.world_size, topology.world_group, progress.line
    )
    stack.callback(checkpoints.close)
    source, fresh = _source(config, checkpoints, data, progress.line)
    engine = make_engine(config, topology, here.world_size)
    stack.callback(engine.close)
    if first:
        for text in [*summary(config, topology, engine), *remarks(config.optimizer, config.model), *data.remarks()]:
            progress.line(text)
    parts = _parts(config, topology, engine, data, checkpoints, progress, screen, stack)
    state = parts.restore(source, weights_only=fresh) if source else State()
    if first:
        (directory / "config.toml").write_text(dump(config))
    if source:
        progress.line(f"{'weights from' if fresh else 'resumed from'} {source}: step {state.step}")
    directory_of_metrics = directory if first else None
    parts.metrics = Metrics(
        directory_of_metrics,
        config.log.tensorboard,
        config.log.wandb,
        config.model_dump(mode="json"),
        state.step,
        progress.line,
    )
    stack.callback(parts.metrics.close)
    if state.step >= config.train.steps:
        progress.line(f"done: {directory} has all {plural(config.train.steps, 'step')}; raise train.steps to go on")
        return 0
    checkpoints.reserve(engine.shards())
    looks = Looks(parts, config.parallel.timeout_seconds)
    parts.evaluate = observer(config, parts, data.validation, looks)
    parts.diagnose = diagnoser(parts, looks)
    train(parts, state)
    return 0


def _source(config: RunConfig, checkpoints: Checkpoints, data: Data, say: Callable[[str], None]) -> tuple[str | None, bool]:
    """Which checkpoint to carry on from, intact and ours, and whether only its weights count."""
    own = None if config.checkpoint.resume == "never" else checkpoints.newest()
    source, fresh = source_of(config, own)
    if source is None:
        return None, False
    meta = read_meta(source)
    refuse_foreign(source, meta, config, None if fresh else data.train.fingerprint)
    for line in changes(meta.config, config.model_dump(mode="json")):
        say(f"changed since {source}: {line}")
    if not fresh and (remark := rate_remark(meta, config)):
        say(remark)
    return source, fresh


def make_engine(config: RunConfig, topology: Topology, world_size: int) -> Engine:
    """The network behind the engine that the configuration names."""
    count = micro_batches(config, world_size)
    here = runtime.world()
    room = runtime.memory_bytes(topology.device, here)
    layout = choose_layout(config, world_size, here.local_world_size, room, topology.device.type)
    model = network(config, topology, layout.recompute)
    floors = rms_floors(model, config.optimizer.rms_floor)
    compiled = config.train.compile if config.optimizer.compile is None else config.optimizer.compile
    optimizer = config.optimizer.model_copy(update={"compile": compiled})
    match config.parallel.engine:
        case "zero":
            parallel = config.parallel.model_copy(update={"zero_hpz_partition_size": layout.zero_hpz_partition_size})
            return Zero(model, parallel, optimizer, config.train, topology, count, floors)
        case "fold":
            return Fold(
                model, optimizer, topology, seed=config.run.seed, rms_floor=floors,
                bucket_numbers=config.parallel.reduce_bucket_numbers,
            )  # fmt: skip
        case _:
            raise ValueError(f"parallel.engine = '{config.parallel.engine}'; legal: zero, fold")


def _parts(
    config: RunConfig, topology: Topology, engine: Engine, data: Data, checkpoints: Checkpoints,
    progress: Progress, screen: TextIO, stack: ExitStack,
) -> Run:  # fmt: skip
    """Everything the loop wants."""

    def report(sentence: str) -> None:  # of a hang: rank 0 may be the one that cannot speak
        print(f"tiglon, rank {topology.rank}: {sentence}", file=screen, flush=True)

    def late() -> None:  # rank 0 speaks for all
        progress.line(_unsaved(checkpoints.address, config.health.grace_seconds))

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
        profile=stack.enter_context(Profile(config.profile, directory, topology.rank)),
        clock=clock,
        stop=stack.enter_context(StopSignal(config.health.grace_seconds, late)),
        meta=lambda state, own: _meta(config, topology, data.train, state, own),
        flops_per_token=(flops[0], flops[1]),
        peak_flops=peak_flops(topology.device, config.train.precision) * topology.world_size,
    )
    if isinstance(engine, Zero):  # fold's momentum holds part of an unfinished step already, so it finishes it
        engine.leave = partial(run.asked_to_stop, at_once=False)
    elif isinstance(engine, Fold):
        engine.before_backward = partial(run.release, steady=False)
    return run


def _unsaved(address: str, grace_seconds: float) -> str:
    """What is told when the grace period ends before the run does."""
    try:
        kept = find(address)
    except (OSError, ValueError):
        kept = ""
    return (
        f"{LAST_WORD * grace_seconds:g} s after the stop signal the run is not saved yet (health.grace_seconds = "
        f"{grace_seconds:g}); if it is killed now, "
        + (f"it resumes from {kept}" if kept else f"there is no complete checkpoint in {address} to resume from")
    )


def _meta(config: RunConfig, topology: Topology, stream: Stream, state: State, own: dict[str, Any]) -> Meta:
    return Meta(
        step=state.step,
        tokens=state.tokens,
        config=config.model_dump(mode="json"),
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
    sys.exit(main())
