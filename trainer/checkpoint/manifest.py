"""The manifest of a checkpoint: JSON a person can read, which says what lies where and whether it is intact."""

import json
import math
import zlib
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from trainer.checkpoint.rectangles import Rectangle

VERSION = 1
FILE = "manifest.json"
CHUNK_BYTES = 1 << 22
"""Bytes under one checksum: what a reader must fetch to trust any part of it."""
_SHOWN_CHARACTERS = 100
"""Of what a fault is about: it may be as long as the file."""

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}
"""safetensors' name -> torch's dtype, of all that a checkpoint may hold."""


@dataclass(frozen=True)
class CheckpointMeta:
    """What a checkpoint says of itself beside its tensors.

    Attributes:
        step: Optimizer updates done.
        tokens: Target tokens seen.
        config: The resolved run configuration.
        fingerprints: Of the corpus and the tokenizer.
        versions: Of tiglon and the libraries that wrote it.
        world: The layout that wrote it.
        extra: Anything else that fits JSON.
    """

    step: int
    tokens: int
    config: dict[str, Any] = field(default_factory=dict)
    fingerprints: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    world: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StoredRectangle:
    """One rectangle in a file: its tensor, where it begins in the file (bytes), the crc32 of each chunk of its rows."""

    tensor: str
    rectangle: Rectangle
    offset: int
    checksums: tuple[int, ...]


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file: bytes in all, crc32 of its header, what it holds, and of which dtypes (safetensors names)."""

    bytes: int
    header_crc32: int
    stored: tuple[StoredRectangle, ...]
    dtypes: dict[str, str]
    shapes: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class CheckpointManifest:
    """Everything about a checkpoint but the values."""

    meta: CheckpointMeta
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    files: dict[str, TensorFile]
    chunk_bytes: int = CHUNK_BYTES


def merge_files(meta: CheckpointMeta, files: dict[str, TensorFile]) -> CheckpointManifest:
    """The manifest of a checkpoint that these files make up.

    Raises:
        ValueError: when they disagree on a tensor, or do not cover one exactly.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    elements: dict[str, int] = {}
    for name, file in files.items():
        for tensor, shape in file.shapes.items():
            dtype = file.dtypes[tensor]
            if (shapes.setdefault(tensor, shape), dtypes.setdefault(tensor, dtype)) != (shape, dtype):
                raise ValueError(f"{name} holds {tensor} as {dtype} {shape}, another rank as {dtypes[tensor]} {shapes[tensor]}")
        for stored in file.stored:
            elements[stored.tensor] = elements.get(stored.tensor, 0) + stored.rectangle.numel
    for tensor, shape in shapes.items():
        if elements[tensor] != math.prod(shape):
            raise ValueError(f"the ranks hold {elements[tensor]} elements of {tensor}, which has {math.prod(shape)}: not saved")
    return CheckpointManifest(meta, dict(sorted(shapes.items())), dtypes, files)


def encode_manifest(manifest: CheckpointManifest) -> bytes:
    """As JSON, one line per tensor and per rectangle; its last key is a checksum of all before it."""
    head = {"format": "tiglon checkpoint", "version": VERSION, **asdict(manifest.meta), "chunk_bytes": manifest.chunk_bytes}
    lines = [f"{_compact(key)}: {json.dumps(value, indent=1)}," for key, value in head.items()]
    tensors = (
        f"{_compact(name)}: {_compact({'shape': shape, 'dtype': manifest.dtypes[name]})}"
        for name, shape in manifest.shapes.items()
    )
    lines += ['"tensors": {', ",\n".join(tensors), "},", '"files": {']
    lines += [",\n".join(_encode_file(name, file) for name, file in manifest.files.items()), "},"]
    body = "{\n" + "\n".join(lines) + "\n"
    return (body + f'"crc32": {zlib.crc32(body.encode())}\n' + "}\n").encode()


def _encode_file(name: str, file: TensorFile) -> str:
    rows = (_compact([s.tensor, s.rectangle.start, s.rectangle.extent, s.offset, s.checksums]) for s in file.stored)
    head = _compact({"bytes": file.bytes, "header_crc32": file.header_crc32})[:-1]
    return f'{_compact(name)}: {head}, "rectangles": [\n' + ",\n".join(rows) + "\n]}"


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def decode_manifest(content: bytes, address: str) -> CheckpointManifest:
    """Read a manifest.

    Raises:
        ValueError: when it is damaged, of a newer version or of something else; `address` names it in the sentence.
    """
    try:
        tree = json.loads(content, object_pairs_hook=_without_duplicates)
        version, checksum = tree["version"], tree["crc32"]
        known = tree["format"] == "tiglon checkpoint"
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{address} is damaged: it is not a complete manifest of a tiglon checkpoint") from None
    if not known or not isinstance(version, int):
        raise ValueError(f"{address} is not the manifest of a tiglon checkpoint")
    if version > VERSION:
        raise ValueError(f"{address} has format version {version}, this tiglon reads up to {VERSION}: update tiglon")
    if zlib.crc32(content[: content.rfind(b'"crc32"')]) != checksum:
        raise ValueError(f"{address} is damaged: its checksum does not match")
    try:
        return _decode(tree)
    except (ValueError, KeyError, TypeError, AttributeError) as reason:
        fault = f"{type(reason).__name__} at {str(reason)[:_SHOWN_CHARACTERS]}"
        raise ValueError(f"{address} is not laid out as a manifest is ({fault}): restore or copy it again") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; raises ValueError where a key stands twice: readers would not agree on which of them holds."""
    tree = dict(pairs)
    if len(tree) != len(pairs):
        raise ValueError("a key stands twice")
    return tree


def _decode(tree: dict[str, Any]) -> CheckpointManifest:
    meta = CheckpointMeta(**{name: tree[name] for name in CheckpointMeta.__dataclass_fields__})
    shapes = {name: tuple(entry["shape"]) for name, entry in tree["tensors"].items()}
    dtypes = {name: entry["dtype"] for name, entry in tree["tensors"].items()}
    files = {name: _decode_file(entry, shapes, dtypes) for name, entry in tree["files"].items()}
    return CheckpointManifest(meta, shapes, dtypes, files, tree["chunk_bytes"])


def _decode_file(entry: dict[str, Any], shapes: dict[str, tuple[int, ...]], dtypes: dict[str, str]) -> TensorFile:
    stored = tuple(
        StoredRectangle(tensor, Rectangle(tuple(start), tuple(extent)), offset, tuple(checksums))
        for tensor, start, extent, offset, checksums in entry["rectangles"]
    )
    inside = {item.tensor for item in stored}
    return TensorFile(
        entry["bytes"], entry["header_crc32"], stored, {n: dtypes[n] for n in inside}, {n: shapes[n] for n in inside}
    )
