"""`tiglon export`: a checkpoint as a Hugging Face model, with one tensor in memory at a time."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer

from data.storage import DiskStore
from launch.checkpoints import find_checkpoint, read_checkpoint_manifest, read_tensor
from launch.commands.new_directory import new_directory, whole_or_nothing
from launch.kept_tokenizer import exported_tokenizer
from model.config import ModelConfig
from model.huggingface.families import exported_config
from model.huggingface.weights import EMBEDDING, StockTensor, exported_tensors
from model.positions.config import PositionConfig
from trainer.checkpoint.format import NAMES, as_bytes, safetensors_header
from trainer.checkpoint.manifest import DTYPES, CheckpointManifest

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
    family: Annotated[
        str, typer.Option(help="Architecture, as qwen3; default that of its import, else the first that computes the same.")
    ] = "",
) -> None:
    """Export a checkpoint as a Hugging Face model that stock transformers loads.

    Example: tiglon export runs/quickstart --output exported
    """
    for sentence in export_model(find_checkpoint(checkpoint), output, dtype, tokenizer, lossy, family):
        typer.echo(sentence)


def export_model(
    path: str, output: Path, dtype: str = "stored", tokenizer: str = "", lossy: bool = False, family: str = ""
) -> list[str]:
    """Export a checkpoint; returns the sentences to show the user.

    Args:
        path: of the checkpoint.
        dtype, tokenizer, lossy, family: as the options of `tiglon export`.

    Raises:
        ValueError, FileNotFoundError: one sentence; nothing is written.
    """
    if dtype not in ("stored", "float32", "bfloat16"):
        raise ValueError(f"--dtype {dtype}: legal are stored, float32, bfloat16")
    store, name = new_directory(output)
    manifest = read_checkpoint_manifest(path)
    config, extra = manifest.meta.config, manifest.meta.extra
    model, position = ModelConfig.model_validate(config["model"]), PositionConfig.model_validate(config["position"])
    length = config["train"]["sequence_length"]
    stored = None if dtype == "stored" else getattr(torch, dtype)
    directory = tokenizer or config["data"].get("tokenizer", "")
    files, end_of_text, further = exported_tokenizer(path, directory, length, bool(tokenizer))
    exported = exported_config(model, position, length, lossy, family, _came_from(manifest))
    written = str(stored or DTYPES[manifest.dtypes[f"weight/{EMBEDDING}"]]).removeprefix("torch.")
    tokens = {"bos_token_id": None, "eos_token_id": end_of_text, "pad_token_id": None, **further, **extra.get("token_ids", {})}
    settings = {**exported.values, "dtype": written, **tokens}
    with whole_or_nothing(store, name, output) as staging:
        _write_weights(store, staging, (path, manifest), exported_tensors(model, exported.family), stored)
        for file, content in {**files, "config.json": json.dumps(settings, indent=2).encode()}.items():
            store.write(f"{staging}/{file}", content)
    sentences = [f"exported {path} as {exported.family.architecture} ({written}) to {output}"]
    return sentences + [f"lost: {sentence}" for sentence in exported.lost] + ([] if files else ["without a tokenizer"])


def _came_from(manifest: CheckpointManifest) -> str:
    """The family of the import that a checkpoint is, or that its training started from; "" if there is none."""
    seen: set[str] = set()
    while not (family := manifest.meta.extra.get("family", "")):
        source = manifest.meta.config.get("checkpoint", {}).get("resume", "auto")
        if source in ("auto", "never") or source in seen:
            return ""
        seen.add(source)
        try:
            manifest = read_checkpoint_manifest(find_checkpoint(source))
        except (FileNotFoundError, ValueError):  # it has moved since
            return ""
    return family


def _write_weights(
    store: DiskStore,
    folder: str,
    source: tuple[str, CheckpointManifest],
    tensors: list[StockTensor],
    dtype: torch.dtype | None,
) -> None:
    """Write safetensors files of at most FILE_BYTES, and their index where there are several.

    Args:
        source: path and manifest of the checkpoint.
        dtype: of the tensors; None = as each is stored.
    """
    path, manifest = source
    stored = {tensor.name: DTYPES[manifest.dtypes[f"weight/{tensor.parts[0]}"]] for tensor in tensors}  # the first part's
    types = {tensor.name: stored[tensor.name] if tensor.precise or dtype is None else dtype for tensor in tensors}
    sizes = {tensor.name: math.prod(tensor.shape) * types[tensor.name].itemsize for tensor in tensors}
    groups = list(_groups(tensors, sizes))
    weight_map: dict[str, str] = {}
    for index, group in enumerate(groups, 1):
        file = "model.safetensors" if len(groups) == 1 else f"model-{index:05d}-of-{len(groups):05d}.safetensors"
        weight_map |= {tensor.name: file for tensor in group}
        sink = store.create(f"{folder}/{file}")
        sink.write(safetensors_header([(tensor.name, NAMES[types[tensor.name]], tensor.shape) for tensor in group]))
        for tensor in group:
            value = tensor.make(*(read_tensor(path, f"weight/{part}", manifest) for part in tensor.parts))
            sink.write(as_bytes(value.to(types[tensor.name]).contiguous().view(-1)))
        sink.close()
    if len(groups) > 1:
        index_text = json.dumps({"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}, indent=2)
        store.write(f"{folder}/{INDEX}", index_text.encode())


def _groups(tensors: list[StockTensor], sizes: dict[str, int]) -> Iterator[list[StockTensor]]:
    """Consecutive tensors of at most FILE_BYTES together; a larger tensor alone. `sizes`: bytes by name."""
    group: list[StockTensor] = []
    size = 0
    for tensor in tensors:
        if group and size + sizes[tensor.name] > FILE_BYTES:
            yield group
            group, size = [], 0
        group.append(tensor)
        size += sizes[tensor.name]
    yield group
