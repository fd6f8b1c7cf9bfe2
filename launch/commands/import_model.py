"""`tiglon import`: a Hugging Face model as a checkpoint, with GROUP_BYTES of tensors in memory at a time."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from safetensors import SafetensorError, safe_open

from data.storage import refuse_lfs_pointer
from launch.commands.export import INDEX
from launch.commands.new_directory import new_directory, whole_or_nothing
from launch.config import build_config, dump
from launch.trained import KEPT_TOKENIZER
from model.huggingface.config import imported_config
from model.sizes import full_shapes
from trainer.checkpoint.format import StagedTensor, write_tensors
from trainer.checkpoint.manifest import FILE, CheckpointMeta, encode_manifest, merge_files
from trainer.checkpoint.rectangles import Rectangle

GROUP_BYTES = 1 << 30
"""Tensors read before they are written, and about the size of a file of the checkpoint."""
CONFIG = "config.toml"
"""Configuration inside the imported checkpoint to start training from."""


def import_command(
    directory: Annotated[Path, typer.Argument(help="Hugging Face model: config.json and safetensors.")],
    output: Annotated[Path, typer.Option(help="New checkpoint directory.")],
) -> None:
    """Import a Hugging Face model as a checkpoint to train from.

    Example: tiglon import exported --output runs/imported
    """
    for sentence in import_model(directory, output):
        typer.echo(sentence)


def import_model(directory: Path, output: Path) -> list[str]:
    """Import a Hugging Face model; returns the sentences to show the user.

    Raises:
        ValueError, FileNotFoundError: one sentence; nothing is written.
    """
    store, name = new_directory(output)
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"{directory} is no Hugging Face model: it has no config.json")
    theirs = _read_json(directory / "config.json")
    model, position, length = imported_config(theirs, str(directory / "config.json"))
    config = build_config(
        {"model": model, "position": position, "train": {"sequence_length": length}}, (), str(directory / "config.json")
    )
    files_by_name = _files_by_name(directory)
    expected = full_shapes(config.model)
    _check_tensors(directory, files_by_name, expected, config.model.tie_word_embeddings)
    tokenizer = _tokenizer_paths(directory)
    tokens = {key: theirs[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in theirs}
    meta = CheckpointMeta(0, 0, config.model_dump(mode="json"), extra={"imported_from": str(directory), "token_ids": tokens})
    files = {}
    with whole_or_nothing(store, name, output) as staging:
        for index, group in enumerate(_read_groups(files_by_name, expected)):
            file = f"part-{index:05d}.safetensors"
            files[file] = write_tensors(store, f"{staging}/{file}", group)
        for file in tokenizer:
            store.write(f"{staging}/{KEPT_TOKENIZER}/{file.name}", file.read_bytes())
        store.write(f"{staging}/{CONFIG}", dump(config).encode())
        store.write(f"{staging}/{FILE}", encode_manifest(merge_files(meta, files)))
    count = sum(math.prod(shape) for shape in expected.values())
    return [f"imported {directory} ({count:,} parameters) to {output}", f"a configuration to train it with: {output / CONFIG}"]


def _read_json(path: Path) -> dict[str, Any]:
    """Raises ValueError for a file that holds no JSON object."""
    refuse_lfs_pointer(path)
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); copy it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object; copy it again")
    return value


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """An open safetensors file. Raises FileNotFoundError, or ValueError for a file that is not one."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there, though {INDEX} names it; copy the model again")
    refuse_lfs_pointer(path)
    try:
        file = safe_open(str(path), framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); copy it again") from None
    with file:
        yield file


def _files_by_name(directory: Path) -> dict[str, Path]:
    """Name of a tensor -> the file that holds it."""
    if (directory / INDEX).is_file():
        weight_map = _read_json(directory / INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{directory / INDEX} has no weight_map; copy it again")
        return {name: directory / file for name, file in weight_map.items()}
    path = directory / "model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{directory} has neither model.safetensors nor {INDEX}")
    with _opened(path) as file:
        return dict.fromkeys(file.keys(), path)


def _check_tensors(directory: Path, files: dict[str, Path], expected: dict[str, tuple[int, ...]], tied: bool) -> None:
    """Raises ValueError unless every tensor of the network is there in its shape, and no other."""
    missing = [name for name in expected if name not in files]
    spare = [name for name in files if name not in expected and not (tied and name == "lm_head.weight")]
    for names, fault in ((missing, "lacks"), (spare, "has")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"{directory} {fault} {names[0]}{more}, which does not fit its config.json")
    for path in sorted(set(files.values())):
        with _opened(path) as file:
            for name in expected.keys() & file.keys():
                shape = tuple(file.get_slice(name).get_shape())
                if shape != expected[name]:
                    raise ValueError(f"{directory} has {name} of shape {shape}, its config.json asks for {expected[name]}")


def _read_groups(files: dict[str, Path], expected: dict[str, tuple[int, ...]]) -> Iterator[list[StagedTensor]]:
    """The tensors, in groups of little more than GROUP_BYTES."""
    group: list[StagedTensor] = []
    size = 0
    for path in sorted(set(files.values())):
        with _opened(path) as file:
            for name in sorted(expected.keys() & file.keys()):
                value = file.get_tensor(name).contiguous().view(-1)
                shape = expected[name]
                group.append(StagedTensor(f"weight/{name}", shape, Rectangle((0,) * len(shape), shape), value))
                size += group[-1].nbytes
                if size > GROUP_BYTES:
                    yield group
                    group, size = [], 0
    if group:
        yield group


def _tokenizer_paths(directory: Path) -> list[Path]:
    names = (
        "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt",
    )  # fmt: skip
    paths = [directory / name for name in names if (directory / name).is_file()]
    for path in paths:
        refuse_lfs_pointer(path)
    return paths
