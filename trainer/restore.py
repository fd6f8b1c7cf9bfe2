"""Reading checkpoints: any layout fills its shards from rectangles that any other layout wrote."""

import math
import re
from collections.abc import Callable
from pathlib import Path

import torch

from trainer.manifest import DTYPES, FILE, Manifest, Meta, decode
from trainer.rectangles import Box, Shard, check, pieces
from trainer.store import Store, join, open_store, read
from trainer.tensorfile import Wanted, read_tensors, verify_file

_NAME = re.compile(r"step-(\d{8,})")


def directory_name(step: int) -> str:
    """Of the checkpoint after `step` updates."""
    return f"step-{step:08d}"


def steps(store: Store) -> list[int]:
    """The steps of the complete checkpoints in a directory, oldest first."""
    found = [int(match[1]) for name in store.entries() if (match := _NAME.fullmatch(name))]
    return sorted(step for step in found if FILE in store.entries(directory_name(step)))


def read_manifest(path: str | Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        FileNotFoundError: when there is none at `path`.
        ValueError: when it is damaged or of a newer version.
    """
    try:
        content = read(open_store(str(path)), FILE)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is not a checkpoint: it has no {FILE}; give a directory like step-00000100") from None
    return decode(content, join(str(path), FILE))


def find(path: str | Path) -> str:
    """The checkpoint meant by `path`: itself, or the newest complete one of a run or of its directory of checkpoints.

    Raises:
        FileNotFoundError: when there is none.
    """
    for place in (str(path), join(str(path), "checkpoints")):
        store = open_store(place)
        if FILE in store.entries():
            return place
        found = steps(store)
        if found:
            return join(place, directory_name(found[-1]))
    raise FileNotFoundError(f"{path} is neither a checkpoint nor a run that has one; give a run directory or step-... in it")


def read_meta(path: str | Path) -> Meta:
    """Step, tokens, config and the rest of a checkpoint; raises as `read_manifest`."""
    return read_manifest(path).meta


def names(path: str | Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Every tensor of a checkpoint: name -> (shape, dtype)."""
    manifest = read_manifest(path)
    return {name: (shape, DTYPES[manifest.dtypes[name]]) for name, shape in manifest.shapes.items()}


def read_tensor(path: str | Path, name: str, manifest: Manifest | None = None) -> torch.Tensor:
    """One full tensor, as it was saved, in host memory. Whoever reads many hands the manifest in.

    Raises:
        ValueError: when there is no such tensor, or the checkpoint is damaged.
    """
    manifest = manifest or read_manifest(path)
    if name not in manifest.shapes:
        raise ValueError(f"{path} has no tensor {name}; `tiglon checkpoint show` lists what it has")
    shape = manifest.shapes[name]
    values = torch.empty(math.prod(shape), dtype=DTYPES[manifest.dtypes[name]])
    _read(path, manifest, {name: [(Box((0,) * len(shape), shape), values)]}, values.numel())
    return values.view(shape)


def load(
    path: str | Path, shards: list[Shard], *, only: Callable[[str], bool] | None = None, beat: Callable[[], None] = lambda: None
) -> Meta:
    """Fill shards in place, whatever layout wrote them; bf16 and fp32 convert into each other. Ranks need not speak.

    Args:
        only: Which names to fill; the others keep their values. Default all.
        beat: Called after each file.

    Raises:
        FileNotFoundError, ValueError: no checkpoint there, damaged, or without a tensor that is wanted.
    """
    manifest = read_manifest(path)
    wanted: Wanted = {}
    numbers = 0
    for shard in shards:
        if only is not None and not only(shard.name):
            continue
        check(shard)
        _compare_shape(path, manifest, shard)
        wanted.setdefault(shard.name, []).extend(pieces(shard))
        numbers += shard.values.numel()
    with torch.no_grad():
        _read(path, manifest, wanted, numbers, beat)
    return manifest.meta


def _compare_shape(path: str | Path, manifest: Manifest, shard: Shard) -> None:
    if shard.name not in manifest.shapes:
        raise ValueError(lacks(path, shard.name, manifest))
    if manifest.shapes[shard.name] != tuple(shard.shape):
        raise ValueError(
            f"checkpoint {path} has {shard.name} of shape {manifest.shapes[shard.name]}, this run wants {tuple(shard.shape)}; "
            "resume with its own [model]"
        )


def lacks(path: str | Path, name: str, manifest: Manifest) -> str:
    """That a checkpoint does not hold what is wanted, and what to do."""
    kind = name.partition("/")[0]
    has = sorted({held.partition("/")[0] for held in manifest.shapes})
    new_run = f"start a new run from its weights: run.dir=NEW checkpoint.resume={path} checkpoint.reset_optimizer=true"
    advice = "resume with its own [model]" if kind == "weight" else new_run
    return f"checkpoint {path} has no {name} (it holds {', '.join(has)}); {advice}"


def _read(path: str | Path, manifest: Manifest, wanted: Wanted, numbers: int, beat: Callable[[], None] = lambda: None) -> None:
    store = open_store(str(path))
    filled = 0
    for name, file in manifest.files.items():
        filled += read_tensors(store, name, join(str(path), name), manifest, file, wanted)
        beat()
    if filled != numbers:
        raise ValueError(
            f"checkpoint {path} covers {filled} of the {numbers} numbers wanted of it: a fault when it was written"
        )


def verify(path: str | Path, share: tuple[int, int] = (0, 1), beat: Callable[[], None] = lambda: None) -> None:
    """Read a checkpoint and check every byte; (i, n) checks every n-th file from the i-th on. `beat` is called as it goes on.

    Raises:
        FileNotFoundError, ValueError: with what is wrong.
    """
    manifest = read_manifest(path)
    store = open_store(str(path))
    for name in list(manifest.files)[share[0] :: share[1]]:
        verify_file(store, name, join(str(path), name), manifest, manifest.files[name], beat)
