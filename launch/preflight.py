"""What can be checked about a run before a file is written or a process group is started."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from data.corpus.stream import Stream
from data.storage import is_remote, join_address, open_store
from data.tokenizer.tokenizer import Tokenizer
from launch import runtime
from launch.batches import ahead
from launch.checkpoints import find_checkpoint, read_checkpoint_manifest
from launch.config import RunConfig
from launch.config_checks import check_config, optimized
from launch.long_contexts import check_contexts_of_run
from launch.planner.layouts import choose_layout
from launch.planner.memory import checkpoint_bytes, memory
from launch.resume import reached, read_lineage, refuse_foreign, settle
from launch.resume_source import choose_start
from trainer.checkpoint.directory import directory_name, saved_steps
from trainer.checkpoint.lineage import Lineage, lineage_of
from trainer.checkpoint.manifest import CheckpointManifest
from trainer.checkpoint.restore import missing_tensor
from trainer.config import CheckpointConfig
from trainer.monitoring.config import NO_TRACKER, TRACKERS
from trainer.monitoring.progress import format_bytes, plural
from trainer.state import State, due


@dataclass(frozen=True)
class Preflight:
    """What is known before the ranks have met: of checkpoints the manifests, not yet the tensors."""

    config: RunConfig
    """As asked for, with the checkpoint's values for training keys that were left unset."""
    path: str = ""
    """Checkpoint that will be resumed unless it turns out to be damaged; empty = none."""
    manifest: CheckpointManifest | None = None
    weights_only: bool = False

    @property
    def state(self) -> State:
        """What the run has reached before it begins."""
        return reached(self.manifest and self.manifest.meta, self.weights_only)


def check_start(begun: Preflight, world: runtime.World, device: torch.device, training: Stream) -> None:
    """Refuse what would fail later.

    Raises:
        ValueError, FileNotFoundError: one sentence.
    """
    config = begun.config
    if config.train.cuda_graphs and device.type == "cpu":
        raise ValueError("train.cuda_graphs = true needs a GPU and this rank runs on a CPU; leave it off")
    if config.train.compile or config.optimizer.compile:
        runtime.need_compiler(device)
    capacity_bytes = runtime.memory_capacity_bytes(device, world)
    choose_layout(ahead(config, begun.state), world.world_size, world.local_world_size, capacity_bytes, device.type)
    check_contexts_of_run(config, capacity_bytes)
    sample_tokenizer(config)
    if config.log.tracker != NO_TRACKER and world.rank == 0:
        TRACKERS[config.log.tracker].find_package()
        if missing := TRACKERS[config.log.tracker].missing(runtime.environment()):
            raise ValueError(f"log.tracker = '{config.log.tracker}': {missing}")
    _check_resume(begun, training)
    if world.rank == 0:
        check_disk(config)


def sample_tokenizer(config: RunConfig) -> Tokenizer | None:
    """The tokenizer for log.sample_prompt and the samples; None without a prompt.

    Raises:
        ValueError, FileNotFoundError: it is not there, or has pieces without a row in the embedding.
    """
    if not config.log.sample_prompt:
        return None
    if not config.data.tokenizer:
        raise ValueError(
            "log.sample_prompt needs data.tokenizer, the directory of the tokenizer; set it or leave the prompt out"
        )
    tokenizer = Tokenizer.load(config.data.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"the tokenizer {config.data.tokenizer} has {tokenizer.vocab_size} pieces, more than model.vocab_size = "
            f"{config.model.vocab_size}; set model.vocab_size to at least that"
        )
    return tokenizer


def begin_run(asked: RunConfig, world: runtime.World) -> Preflight:
    """Find the checkpoint that the run resumes from, fill in what was left unset, and check that all of it holds together.

    Raises:
        ValueError, FileNotFoundError: it is not there, or contradicts the configuration.
    """
    address, manifests = checkpoint_address(asked), dict[int, CheckpointManifest | None]()

    steps = saved_steps(open_store(address)) if is_remote(address) or Path(address).is_dir() else []

    def lineages() -> Iterator[tuple[int, Lineage | None]]:
        for step in reversed(steps):
            if step not in manifests:
                try:
                    manifests[step] = read_checkpoint_manifest(join_address(address, directory_name(step)))
                except (ValueError, FileNotFoundError):
                    manifests[step] = None
            manifest = manifests[step]
            yield step, None if manifest is None else lineage_of(manifest.meta.extra)

    start = choose_start(asked.checkpoint, world, read_lineage(asked.run.dir), lineages())
    if start.resumes:
        step = next((step for step, lineage in lineages() if lineage is not None and lineage.id == start.lineage.id), None)
        if step is None:
            return Preflight(asked)  # all are damaged, which is said once they have been read
        path, manifest = join_address(address, directory_name(step)), manifests[step]
        assert manifest is not None
        return Preflight(settle(asked, manifest.meta), path, manifest)
    if not start.lineage.source or start.lineage.weights_only:
        check_config(asked)
    if not start.lineage.source:
        return Preflight(asked)
    path = find_checkpoint(start.lineage.source)
    manifest = read_checkpoint_manifest(path)
    fresh = start.lineage.weights_only
    return Preflight(asked if fresh else settle(asked, manifest.meta), path, manifest, fresh)


def _check_resume(begun: Preflight, training: Stream) -> None:
    """The checkpoint that the run will start from, as far as its manifest tells. Its bytes are checked when it is read."""
    if begun.manifest is None:
        return
    fresh = begun.weights_only
    refuse_foreign(begun.path, begun.manifest.meta, begun.config, None if fresh else training)
    if not fresh and (name := _missing_state(begun.config, begun.manifest)):
        raise ValueError(missing_tensor(begun.path, name, begun.manifest))


def _missing_state(config: RunConfig, manifest: CheckpointManifest) -> str:
    """A state that the optimizer resumes from and the checkpoint does not hold; "" for none."""
    settings, parameters, _ = optimized(config)
    for name, kind in parameters:
        for state in settings.assigned(name, kind).rule.states:
            if f"{state}/{name}" not in manifest.shapes:
                return f"{state}/{name}"
    return ""


def checkpoint_address(config: RunConfig) -> str:
    """Where checkpoints go: a path or an object-store address."""
    return config.checkpoint.directory or str(Path(config.run.dir) / "checkpoints")


def check_disk(config: RunConfig) -> None:
    """Check that the run directory can be made and that all checkpoints that lie there at a time fit on the disk.

    Raises:
        ValueError: it cannot, or they do not.
    """
    address = checkpoint_address(config)
    for key, directory in (("run.dir", config.run.dir), ("checkpoint.directory", address)):
        if not is_remote(directory) and (file := _blocking_file(Path(directory).absolute())):
            raise ValueError(f"{key} = '{directory}' cannot be a directory: {file} is a file; give another path")
    if is_remote(address):
        return
    directory = Path(address).absolute()
    steps = saved_steps(open_store(address)) if directory.is_dir() else []
    while not directory.is_dir():
        directory = directory.parent
    more = checkpoints_at_once(config.checkpoint, config.train.steps, max(steps, default=0)) - len(steps)
    wanted, free = more * checkpoint_bytes(config), shutil.disk_usage(directory).free
    if wanted > free:
        raise ValueError(
            f"{address} will hold {plural(more, 'more checkpoint')} of {format_bytes(wanted / more)} each, "
            f"but {directory} has {format_bytes(free)} left; make room, or choose another checkpoint.directory, a smaller "
            "checkpoint.keep or a larger checkpoint.keep_every_steps"
        )


def memory_remark(acting: RunConfig, world: runtime.World, device: torch.device) -> str:
    """One sentence where the planner's arithmetic says that a rank needs more memory than there is; else "".

    Args:
        acting: what is `ahead`.
    """
    capacity_bytes = runtime.memory_capacity_bytes(device, world)
    layout = choose_layout(acting, world.world_size, world.local_world_size, capacity_bytes, device.type)
    peak = memory(acting, layout, device.type).peak
    if peak <= capacity_bytes:
        return ""
    return (
        f"memory: a rank needs about {format_bytes(peak)} and has {format_bytes(capacity_bytes)}, so it may be killed "
        "or end out of memory; use a smaller train.micro_batch_size or train.sequence_length, train.recompute=full, or more "
        "ranks with parallel.zero_stage=3, parallel.tensor_parallel_size, parallel.context_parallel_size or "
        "parallel.pipeline_parallel_size (tiglon plan shows what fits)"
    )


def _blocking_file(path: Path) -> Path | None:
    """The file in the way of a directory, if there is one."""
    return next((place for place in (path, *path.parents) if place.exists() and not place.is_dir()), None)


def checkpoints_at_once(settings: CheckpointConfig, last_step: int, done: int) -> int:
    """Most checkpoints that lie in the directory at a time: an old one is removed when a new one is complete."""
    saved = [step for step in range(done + 1, last_step + 1) if due(step, settings.every_steps) or step == last_step]
    kept = settings.keep + 1
    return len([step for step in saved[:-kept] if due(step, settings.keep_every_steps)]) + min(len(saved) + bool(done), kept)
