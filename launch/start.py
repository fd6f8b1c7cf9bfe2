"""Everything about a run that can be known before it starts: checked before a file is written or a process group made."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from data.stream import Stream
from data.tokenizer import Tokenizer
from launch import runtime
from launch.config import RunConfig
from launch.memory import checkpoint_bytes, memory
from launch.plan import choose_layout
from launch.resume import choose_start, read_life, refuse_foreign, settle
from trainer.config import CheckpointConfig, OptimizerConfig
from trainer.life import Life, life_in
from trainer.manifest import Manifest
from trainer.metrics import find_wandb
from trainer.optimizer import rule
from trainer.restore import directory_name, find, lacks, read_manifest, steps
from trainer.state import due
from trainer.store import is_remote, join, open_store


@dataclass(frozen=True)
class Beginning:
    """What is known of a start before any rank has spoken to another: manifests, not yet the bytes below them."""

    config: RunConfig
    """That acts: as asked for, and as in the checkpoint where nothing was asked for."""
    path: str = ""
    """Checkpoint that will be resumed unless it turns out to be damaged; empty = none."""
    manifest: Manifest | None = None
    weights_only: bool = False


def check_start(begun: Beginning, here: runtime.World, device: torch.device, training: Stream) -> None:
    """Refuse what would fail later.

    Raises:
        ValueError, FileNotFoundError: one sentence.
    """
    config = begun.config
    if config.train.cuda_graphs and device.type == "cpu":
        raise ValueError("train.cuda_graphs = true needs a GPU and this rank runs on a CPU; leave it off")
    if config.train.compile or config.optimizer.compile:
        runtime.need_compiler(device)
    room = runtime.memory_bytes(device, here)
    choose_layout(config, here.world_size, here.local_world_size, room, device.type)
    sample_tokenizer(config)
    if config.log.wandb and here.rank == 0:
        find_wandb(config.log.wandb)
    _check_resume(begun, training)
    if here.rank == 0:
        check_disk(config)


def sample_tokenizer(config: RunConfig) -> Tokenizer | None:
    """What encodes log.sample_prompt and decodes the samples.

    Raises:
        ValueError, FileNotFoundError: it is not there, or has pieces that the network has no rows for.
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


def begin(asked: RunConfig, here: runtime.World) -> Beginning:
    """Find what the run goes on from, and fill in what was left unset.

    Raises:
        ValueError, FileNotFoundError: it is not there, or does not go with the configuration.
    """
    address, manifests = checkpoint_address(asked), dict[int, Manifest | None]()

    there = steps(open_store(address)) if is_remote(address) or Path(address).is_dir() else []

    def lives() -> Iterator[tuple[int, Life | None]]:
        for step in reversed(there):
            if step not in manifests:
                try:
                    manifests[step] = read_manifest(join(address, directory_name(step)))
                except (ValueError, FileNotFoundError):
                    manifests[step] = None
            manifest = manifests[step]
            yield step, None if manifest is None else life_in(manifest.meta.extra.get("life", {}))

    start = choose_start(asked.checkpoint, here, read_life(asked.run.dir), lives())
    if start.resumes:
        step = next((step for step, life in lives() if life is not None and life.id == start.life.id), None)
        if step is None:
            return Beginning(asked)  # all are damaged, which is said once they have been read
        path, manifest = join(address, directory_name(step)), manifests[step]
        assert manifest is not None
        return Beginning(settle(asked, manifest.meta), path, manifest)
    if not start.life.source:
        return Beginning(asked)
    path = find(start.life.source)
    manifest = read_manifest(path)
    fresh = start.life.weights_only
    return Beginning(asked if fresh else settle(asked, manifest.meta), path, manifest, fresh)


def _check_resume(begun: Beginning, training: Stream) -> None:
    """The checkpoint that the run will start from, as far as its manifest tells. Its bytes are checked when it is read."""
    if begun.manifest is None:
        return
    fresh = begun.weights_only
    refuse_foreign(begun.path, begun.manifest.meta, begun.config, None if fresh else training.fingerprint)
    if not fresh and (name := _lacking(begun.config.optimizer, begun.manifest)):
        raise ValueError(lacks(begun.path, name, begun.manifest))


def _lacking(settings: OptimizerConfig, manifest: Manifest) -> str:
    """A state that the optimizer goes on with and the checkpoint does not hold; "" for none."""
    for kind, weight in (("embedding", "model.embed_tokens.weight"), ("vector", "model.norm.weight")):
        for state in ("momentum", "second_moment") if rule(kind, settings) == "adamw" else ("momentum",):
            if f"{state}/{weight}" not in manifest.shapes:
                return f"{state}/{weight}"
    return ""


def checkpoint_address(config: RunConfig) -> str:
    """Where checkpoints go."""
    return config.checkpoint.directory or str(Path(config.run.dir) / "checkpoints")


def check_disk(config: RunConfig) -> None:
    """Whether the run and its checkpoints can lie where they go, and as many as will lie there at a time fit.

    Raises:
        ValueError: no.
    """
    address = checkpoint_address(config)
    for key, directory in (("run.dir", config.run.dir), ("checkpoint.directory", address)):
        if not is_remote(directory) and (file := _file_among(Path(directory).absolute())):
            raise ValueError(f"{key} = '{directory}' cannot be a directory: {file} is a file; give another path")
    if is_remote(address):
        return
    place = Path(address).absolute()
    there = steps(open_store(address)) if place.is_dir() else []
    while not place.is_dir():
        place = place.parent
    more = checkpoints_at_once(config.checkpoint, config.train.steps, max(there, default=0)) - len(there)
    wanted, free = more * checkpoint_bytes(config), shutil.disk_usage(place).free
    if wanted > free:
        raise ValueError(
            f"{address} will hold {more} more checkpoint{'s' if more > 1 else ''} of {wanted / more / 2**20:,.0f} MiB each, "
            f"but {place} has {free / 2**20:,.0f} MiB left; make room, or choose another checkpoint.directory, a smaller "
            "checkpoint.keep or a larger checkpoint.keep_every_steps"
        )


def memory_remark(acting: RunConfig, here: runtime.World, device: torch.device) -> str:
    """One sentence where the planner's arithmetic says that a rank needs more memory than there is; else ""."""
    room = runtime.memory_bytes(device, here)
    layout = choose_layout(acting, here.world_size, here.local_world_size, room, device.type)
    peak = memory(acting, layout, device.type).peak
    if peak <= room:
        return ""
    return (
        f"memory: a rank needs about {peak / 2**30:,.1f} GiB and has {room / 2**30:,.1f} GiB, so it may be killed or end out "
        "of memory; use a smaller train.micro_batch_size or train.sequence_length, train.recompute=full, or more ranks with "
        "parallel.zero_stage=3 or parallel.tensor_parallel_size (tiglon plan shows what fits)"
    )


def _file_among(path: Path) -> Path | None:
    """The path or the one above it that is there and is no directory."""
    return next((place for place in (path, *path.parents) if place.exists() and not place.is_dir()), None)


def checkpoints_at_once(settings: CheckpointConfig, last_step: int, done: int) -> int:
    """Most checkpoints that lie in the directory at a time: an old one is removed when a new one is complete."""
    saved = [step for step in range(done + 1, last_step + 1) if due(step, settings.every_steps) or step == last_step]
    kept = settings.keep + 1
    return len([step for step in saved[:-kept] if due(step, settings.keep_every_steps)]) + min(len(saved) + bool(done), kept)
