"""Checkpoints by path or object-store address: the functions of trainer/checkpoint with the file layer handed in."""

import tomllib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from data.storage import open_store
from launch.resume import CONFIG_FILE
from launch.versions import translate_checkpoint
from trainer.checkpoint.directory import newest_complete
from trainer.checkpoint.manifest import CheckpointManifest, CheckpointMeta
from trainer.checkpoint.rectangles import Shard
from trainer.checkpoint.restore import CheckpointReader


def find_checkpoint(path: str | Path) -> str:
    """The checkpoint meant by `path`, as `newest_complete`; of a run also where its checkpoint.directory is."""
    return newest_complete(open_store(checkpoint_directory(str(path)))).address


def checkpoint_directory(address: str) -> str:
    """The checkpoint.directory of a run whose configuration names one; any other address as it is."""
    with suppress(OSError, ValueError, AttributeError):
        kept = tomllib.loads((Path(address) / CONFIG_FILE).read_text())
        return str(kept.get("checkpoint", {}).get("directory") or address)
    return address


def read_checkpoint_manifest(path: str | Path) -> CheckpointManifest:
    """As `CheckpointReader.manifest`, its configuration under the present names of keys."""
    manifest = CheckpointReader(open_store(str(path))).manifest
    translate_checkpoint(manifest.meta.config)
    return manifest


def read_meta(path: str | Path) -> CheckpointMeta:
    """Step, tokens, config and the rest of a checkpoint; raises as `read_checkpoint_manifest`."""
    return read_checkpoint_manifest(path).meta


def tensor_names(path: str | Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """As `CheckpointReader.tensors`."""
    return CheckpointReader(open_store(str(path))).tensors()


def read_tensor(path: str | Path, name: str, manifest: CheckpointManifest | None = None) -> torch.Tensor:
    """As `CheckpointReader.tensor`. Whoever reads many tensors hands the manifest in."""
    return CheckpointReader(open_store(str(path)), manifest).tensor(name)


def load_checkpoint(path: str | Path, shards: list[Shard], only: Callable[[str], bool] | None = None) -> CheckpointMeta:
    """As `CheckpointReader.load`."""
    return CheckpointReader(open_store(str(path))).load(shards, only)


def verify_checkpoint(path: str | Path) -> None:
    """Read a checkpoint and check every byte, as `CheckpointReader.verify`."""
    CheckpointReader(open_store(str(path))).verify()
