"""`tiglon export`: a checkpoint as a Hugging Face model, with one tensor in memory at a time."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer

from data.storage import DiskStore
from data.tokenizer.huggingface import tokenizer_files
from data.tokenizer.tokenizer import DESCRIPTION, Tokenizer
from launch.checkpoints import find_checkpoint, read_checkpoint_manifest, read_tensor
from launch.commands.new_directory import new_directory, whole_or_nothing
from launch.trained import KEPT_TOKENIZER
from model.config import ModelConfig
from model.huggingface.config import exported_config
from model.huggingface.weights import ExportedTensor, exported_tensors
from model.positions.config import PositionConfig
from trainer.checkpoint.format import NAMES, as_bytes, safetensors_header
from trainer.checkpoint.manifest import CheckpointManifest

FILE_BYTES = 5_000_000_000
"""Bytes per exported file at most, the size of shard that Hugging Face's hub recommends."""
INDEX = "model.safetensors.index.json"
"""Which file holds which tensor, where there are several."""


def export_command(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint, or a run: its newest one.")],
    output: Annotated[Path, typer.Option(help="New directory for the model.")],
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, or stored: as in the checkpoint.")] = "stored",
    tokenizer: Annotated[str, typer.Option(help="Tokenizer directory, or none; default the run's own.")] = "",
    lossy: Annotated[bool, typer.Option(help="Export even where stock architectures lose something.")] = False,
) -> None:
    """Export a checkpoint as a Hugging Face model that stock transformers loads.

    Example: tiglon export runs/quickstart --output exported
    """
    for sentence in export_model(find_checkpoint(checkpoint), output, dtype, tokenizer, lossy):
        typer.echo(sentence)


def export_model(path: str, output: Path, dtype: str = "stored", tokenizer: str = "", lossy: bool = False) -> list[str]:
    """Export a checkpoint; returns the sentences to show the user.

    Args:
        path: of the checkpoint.
        dtype, tokenizer, lossy: as the options of `tiglon export`.

    Raises:
        ValueError, FileNotFoundError: one sentence; nothing is written.
    """
    if dtype not in ("stored", "float32", "bfloat16"):
        raise ValueError(f"--dtype {dtype}: legal are stored, float32, bfloat16")
    store, name = new_directory(output)
    manifest = read_checkpoint_manifest(path)
    config = manifest.meta.config
    model, position = ModelConfig.model_validate(config["model"]), PositionConfig.model_validate(config["position"])
    length = config["train"]["sequence_length"]
    stored = manifest.dtypes["weight/model.embed_tokens.weight"] if dtype == "stored" else NAMES[getattr(torch, dtype)]
    files, end_of_text = _tokenizer_files(path, tokenizer or config["data"].get("tokenizer", ""), length, bool(tokenizer))
    written = {"F32": "float32", "BF16": "bfloat16"}[stored]
    settings, lost = exported_config(model, position, length, end_of_text, written, lossy)
    settings |= manifest.meta.extra.get("token_ids", {})
    with whole_or_nothing(store, name, output) as staging:
        _write_weights(store, staging, path, manifest, exported_tensors(model), stored)
        for file, content in {**files, "config.json": json.dumps(settings, indent=2).encode()}.items():
            store.write(f"{staging}/{file}", content)
    sentences = [f"exported {path} as {settings['architectures'][0]} ({written}) to {output}"]
    return sentences + [f"lost: {sentence}" for sentence in lost] + ([] if files else ["without a tokenizer"])


def _tokenizer_files(path: str, directory: str, length: int, requested: bool) -> tuple[dict[str, bytes], int | None]:
    """(file name -> content, end-of-text id) of the tokenizer. An imported checkpoint keeps its own files.

    Args:
        requested: whether `directory` is the user's (--tokenizer), not the run's.
    """
    kept = Path(path) / KEPT_TOKENIZER
    if not requested and kept.is_dir():
        return {file.name: file.read_bytes() for file in sorted(kept.iterdir())}, None
    if directory == "none":
        return {}, None
    if not directory or (not requested and not (Path(directory) / DESCRIPTION).exists()):
        raise FileNotFoundError(f"the tokenizer of {path} is not at '{directory}'; give --tokenizer DIR, or --tokenizer none")
    tokenizer = Tokenizer.load(directory)
    return tokenizer_files(tokenizer, length), tokenizer.end_of_text


def _write_weights(
    store: DiskStore, folder: str, path: str, manifest: CheckpointManifest, tensors: list[ExportedTensor], stored: str
) -> None:
    """Write safetensors files of at most FILE_BYTES, and their index where there are several.

    Args:
        stored: dtype of the tensors by its safetensors name, F32 or BF16.
    """
    dtype = next(dtype for dtype, name in NAMES.items() if name == stored)
    groups = list(_groups(tensors, dtype.itemsize))
    weight_map: dict[str, str] = {}
    for index, group in enumerate(groups, 1):
        file = "model.safetensors" if len(groups) == 1 else f"model-{index:05d}-of-{len(groups):05d}.safetensors"
        weight_map |= {tensor.name: file for tensor in group}
        sink = store.create(f"{folder}/{file}")
        sink.write(safetensors_header([(tensor.name, stored, tensor.shape) for tensor in group]))
        for tensor in group:
            value = tensor.make(*(read_tensor(path, f"weight/{part}", manifest) for part in tensor.parts))
            sink.write(as_bytes(value.to(dtype).contiguous().view(-1)))
        sink.close()
    if len(groups) > 1:
        total = sum(math.prod(tensor.shape) for tensor in tensors) * dtype.itemsize
        index_text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
        store.write(f"{folder}/{INDEX}", index_text.encode())


def _groups(tensors: list[ExportedTensor], itemsize: int) -> Iterator[list[ExportedTensor]]:
    """Consecutive tensors of at most FILE_BYTES together; a larger tensor alone."""
    group: list[ExportedTensor] = []
    size = 0
    for tensor in tensors:
        tensor_bytes = math.prod(tensor.shape) * itemsize
        if group and size + tensor_bytes > FILE_BYTES:
            yield group
            group, size = [], 0
        group.append(tensor)
        size += tensor_bytes
    yield group
