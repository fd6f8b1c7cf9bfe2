"""Models leave for Hugging Face and come back: `tiglon export` and `tiglon import`. One tensor in memory at a time."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors import SafetensorError, safe_open

from data.fast_tokenizer import tokenizer_files
from data.storage import naming, refuse_pointer
from data.tokenizer import DESCRIPTION, Tokenizer
from launch.config import build, dump
from model.config import ModelConfig, PositionConfig
from model.weights import Outgoing, exported_config, imported_config, outgoing, shapes
from trainer.checkpoint import Meta, find, read_manifest, read_tensor
from trainer.manifest import FILE, Manifest, assemble, encode
from trainer.rectangles import Box
from trainer.store import Disk, is_remote, write
from trainer.tensorfile import NAMES, Piece, as_bytes, safetensors_header, write_tensors

FILE_BYTES = 5_000_000_000
"""Most bytes of an exported file, as Hugging Face's hub likes them."""
GROUP_BYTES = 1 << 30
"""Bytes read at once on import."""
INDEX = "model.safetensors.index.json"
CONFIG = "config.toml"
"""An imported checkpoint's configuration, for training to start from."""
KEPT = "tokenizer"
"""Where an imported checkpoint keeps the files of its tokenizer."""


def export_command(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint, or a run: its newest one.")],
    output: Annotated[Path, typer.Option(help="New directory for the model.")],
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, or stored: as in the checkpoint.")] = "stored",
    tokenizer: Annotated[str, typer.Option(help="Tokenizer directory, or none; default the run's own.")] = "",
    lossy: Annotated[bool, typer.Option(help="Export even what stock architectures cannot fully say.")] = False,
) -> None:
    """Write a checkpoint as a Hugging Face model that stock transformers loads.

    Example: tiglon export runs/quickstart --output exported
    """
    for sentence in export_model(find(checkpoint), output, dtype, tokenizer, lossy):
        typer.echo(sentence)


def import_command(
    directory: Annotated[Path, typer.Argument(help="Hugging Face model: config.json and safetensors.")],
    output: Annotated[Path, typer.Option(help="New checkpoint directory.")],
) -> None:
    """Bring a Hugging Face model in as a checkpoint to go on training from.

    Example: tiglon import exported --output runs/imported
    """
    for sentence in import_model(directory, output):
        typer.echo(sentence)


def export_model(path: str, output: Path, dtype: str = "stored", tokenizer: str = "", lossy: bool = False) -> list[str]:
    """Export a checkpoint; what to tell the user.

    Raises:
        ValueError, FileNotFoundError: one sentence; nothing is written.
    """
    if dtype not in ("stored", "float32", "bfloat16"):
        raise ValueError(f"--dtype {dtype}: legal are stored, float32, bfloat16")
    store, name = _new(output)
    manifest = read_manifest(path)
    config = manifest.meta.config
    model, position = ModelConfig.model_validate(config["model"]), PositionConfig.model_validate(config["position"])
    length = config["train"]["sequence_length"]
    numbers = manifest.dtypes["weight/model.embed_tokens.weight"] if dtype == "stored" else NAMES[getattr(torch, dtype)]
    files, end_of_text = _tokenizer_files(path, tokenizer or config["data"].get("tokenizer", ""), length, bool(tokenizer))
    written = {"F32": "float32", "BF16": "bfloat16"}[numbers]
    settings, lost = exported_config(model, position, length, end_of_text, written, lossy)
    settings |= manifest.meta.extra.get("token_ids", {})
    with _whole(store, name, output) as staging:
        _write_weights(store, staging, path, manifest, outgoing(model), numbers)
        for file, content in {**files, "config.json": json.dumps(settings, indent=2).encode()}.items():
            write(store, f"{staging}/{file}", content)
    told = [f"exported {path} as {settings['architectures'][0]} ({written}) to {output}"]
    return told + [f"lost: {sentence}" for sentence in lost] + ([] if files else ["without a tokenizer"])


def _new(output: Path) -> tuple[Disk, str]:
    """The directory a new one is made in, and its name there."""
    if is_remote(str(output)):
        raise ValueError(f"--output {output} must be a local directory; copy it to an object store afterwards")
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"--output {output} is there already and not empty; give a new directory")
    return Disk(str(output.absolute().parent)), output.absolute().name


@contextmanager
def _whole(store: Disk, name: str, output: Path) -> Iterator[str]:
    """The folder to write into: at the end it stands under its name; when anything goes wrong, nothing is left of it."""
    staging = store.staging(name)
    try:
        with naming(str(output)):
            store.remove(staging)
            yield staging
            store.publish(name)
    except BaseException:
        with suppress(OSError):
            store.remove(staging)
        raise


def _tokenizer_files(path: str, directory: str, length: int, asked: bool) -> tuple[dict[str, bytes], int | None]:
    """Files of the tokenizer and its end-of-text id."""
    kept = Path(path) / KEPT
    if not asked and kept.is_dir():
        return {file.name: file.read_bytes() for file in sorted(kept.iterdir())}, None
    if directory == "none":
        return {}, None
    if not directory or (not asked and not (Path(directory) / DESCRIPTION).exists()):
        raise FileNotFoundError(f"the tokenizer of {path} is not at '{directory}'; give --tokenizer DIR, or --tokenizer none")
    tokenizer = Tokenizer.load(directory)
    return tokenizer_files(tokenizer, length), tokenizer.end_of_text


def _write_weights(store: Disk, folder: str, path: str, manifest: Manifest, tensors: list[Outgoing], numbers: str) -> None:
    dtype = _dtype(numbers)
    groups = list(_groups(tensors, dtype.itemsize))
    places: dict[str, str] = {}
    for index, group in enumerate(groups, 1):
        file = "model.safetensors" if len(groups) == 1 else f"model-{index:05d}-of-{len(groups):05d}.safetensors"
        places |= {tensor.name: file for tensor in group}
        sink = store.create(f"{folder}/{file}")
        sink.write(safetensors_header([(tensor.name, numbers, tensor.shape) for tensor in group]))
        for tensor in group:
            value = tensor.make(*(read_tensor(path, f"weight/{part}", manifest) for part in tensor.parts))
            sink.write(as_bytes(value.to(dtype).contiguous().view(-1)))
        sink.close()
    if len(groups) > 1:
        total = sum(math.prod(tensor.shape) for tensor in tensors) * dtype.itemsize
        index_text = json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2)
        write(store, f"{folder}/{INDEX}", index_text.encode())


def _dtype(numbers: str) -> torch.dtype:
    return {name: dtype for dtype, name in NAMES.items()}[numbers]


def _groups(tensors: list[Outgoing], itemsize: int) -> Iterator[list[Outgoing]]:
    group: list[Outgoing] = []
    size = 0
    for tensor in tensors:
        more = math.prod(tensor.shape) * itemsize
        if group and size + more > FILE_BYTES:
            yield group
            group, size = [], 0
        group.append(tensor)
        size += more
    yield group


def import_model(directory: Path, output: Path) -> list[str]:
    """Import a Hugging Face model; what to tell the user.

    Raises:
        ValueError, FileNotFoundError: one sentence; nothing is written.
    """
    store, name = _new(output)
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"{directory} is no Hugging Face model: it has no config.json")
    theirs = _read_json(directory / "config.json")
    model, position, length = imported_config(theirs, str(directory / "config.json"))
    config = build(
        {"model": model, "position": position, "train": {"sequence_length": length}}, (), str(directory / "config.json")
    )
    places = _places(directory)
    wanted = shapes(config.model)
    _compare(directory, places, wanted, config.model.tie_word_embeddings)
    tokenizer = _tokenizer_paths(directory)
    tokens = {key: theirs[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in theirs}
    meta = Meta(0, 0, config.model_dump(mode="json"), extra={"imported_from": str(directory), "token_ids": tokens})
    files = {}
    with _whole(store, name, output) as staging:
        for index, group in enumerate(_read_groups(directory, places, wanted)):
            file = f"part-{index:05d}.safetensors"
            files[file] = write_tensors(store, f"{staging}/{file}", group)
        for file in tokenizer:
            write(store, f"{staging}/{KEPT}/{file.name}", file.read_bytes())
        write(store, f"{staging}/{CONFIG}", dump(config).encode())
        write(store, f"{staging}/{FILE}", encode(assemble(meta, files)))
    count = sum(math.prod(shape) for shape in wanted.values())
    return [f"imported {directory} ({count:,} parameters) to {output}", f"a configuration to train it with: {output / CONFIG}"]


def _read_json(path: Path) -> dict[str, Any]:
    """Raises ValueError for a file that holds no JSON object."""
    refuse_pointer(path)
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); copy it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object; copy it again")
    return value


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file. Raises FileNotFoundError, or ValueError for a file that is none."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there, though {INDEX} names it; copy the model again")
    refuse_pointer(path)
    try:
        file = safe_open(str(path), framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); copy it again") from None
    with file:
        yield file


def _places(directory: Path) -> dict[str, Path]:
    """Tensor name -> file."""
    if (directory / INDEX).is_file():
        table = _read_json(directory / INDEX).get("weight_map")
        if not isinstance(table, dict):
            raise ValueError(f"{directory / INDEX} has no weight_map; copy it again")
        return {name: directory / file for name, file in table.items()}
    path = directory / "model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{directory} has neither model.safetensors nor {INDEX}")
    with _opened(path) as file:
        return dict.fromkeys(file.keys(), path)


def _compare(directory: Path, places: dict[str, Path], wanted: dict[str, tuple[int, ...]], tied: bool) -> None:
    """Every tensor of the network is there in its shape, and nothing else."""
    missing = [name for name in wanted if name not in places]
    spare = [name for name in places if name not in wanted and not (tied and name == "lm_head.weight")]
    for names, fault in ((missing, "lacks"), (spare, "has")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"{directory} {fault} {names[0]}{more}, which does not fit its config.json")
    for path in sorted(set(places.values())):
        with _opened(path) as file:
            for name in wanted.keys() & file.keys():
                shape = tuple(file.get_slice(name).get_shape())
                if shape != wanted[name]:
                    raise ValueError(f"{directory} has {name} of shape {shape}, its config.json asks for {wanted[name]}")


def _read_groups(directory: Path, places: dict[str, Path], wanted: dict[str, tuple[int, ...]]) -> Iterator[list[Piece]]:
    group: list[Piece] = []
    size = 0
    for path in sorted(set(places.values())):
        with _opened(path) as file:
            for name in sorted(wanted.keys() & file.keys()):
                value = file.get_tensor(name).contiguous().view(-1)
                shape = wanted[name]
                group.append(Piece(f"weight/{name}", shape, Box((0,) * len(shape), shape), value))
                size += group[-1].nbytes
                if size > GROUP_BYTES:
                    yield group
                    group, size = [], 0
    if group:
        yield group


def _tokenizer_paths(directory: Path) -> list[Path]:
    names = (
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "vocab.json",
        "merges.txt",
    )
    found = [directory / name for name in names if (directory / name).is_file()]
    for path in found:
        refuse_pointer(path)
    return found
