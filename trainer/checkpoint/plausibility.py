"""Whether what a manifest says can be true. A checkpoint may be a stranger's.

Its checksums prove that it is whole, not that it is meant well: names must stay in its directory, and no memory is taken for
what its files cannot hold.
"""

import math
import re
from collections.abc import Iterator
from typing import Any

from trainer.checkpoint.lineage import lineage_of
from trainer.checkpoint.manifest import DTYPES, CheckpointManifest, CheckpointMeta, StoredRectangle, TensorFile

MAX_MANIFEST_BYTES = 1 << 28
"""A checkpoint of 10 TB has about 30 MB of checksums in its manifest."""
MAX_HEADER_BYTES = 100_000_000
"""Of a safetensors file (https://github.com/huggingface/safetensors, MAX_HEADER_SIZE)."""
_MAX_CHUNK_BYTES = 1 << 30
_MAX_DIMENSIONS = 16
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}")
_SHOWN_CHARACTERS = 100


def check_manifest(manifest: CheckpointManifest, address: str) -> None:
    """Raises ValueError with the first thing in a manifest that cannot be; `address` names it in the sentence."""
    fault = next(_faults(manifest), "")
    if fault:
        raise ValueError(f"{address} cannot be a checkpoint's manifest: {fault}; do not use this checkpoint")


def _faults(manifest: CheckpointManifest) -> Iterator[str]:
    yield from _meta_faults(manifest.meta)
    if not _is_count(manifest.chunk_bytes) or not 1 <= manifest.chunk_bytes <= _MAX_CHUNK_BYTES:
        yield f"chunk_bytes is {_shown(manifest.chunk_bytes)}, wanted 1 to {_MAX_CHUNK_BYTES}"
    for name, shape in manifest.shapes.items():
        if len(shape) > _MAX_DIMENSIONS or not all(map(_is_count, shape)):
            yield f"{_shown(name)} has shape {_shown(shape)}, wanted up to {_MAX_DIMENSIONS} whole numbers below 2**63"
        if not isinstance(dtype := manifest.dtypes[name], str) or dtype not in DTYPES:
            yield f"{_shown(name)} has dtype {_shown(dtype)}, wanted one of {', '.join(DTYPES)}"
    for name, file in manifest.files.items():
        if not _FILE_NAME.fullmatch(name):
            yield f"it names a file {_shown(name)}, wanted a plain name of letters, digits and _.-"
        yield from _file_faults(name, file)
    yield from _coverage_faults(manifest)


def _meta_faults(meta: CheckpointMeta) -> Iterator[str]:
    for key in ("step", "tokens"):
        if not _is_count(getattr(meta, key)):
            yield f"{key} is {_shown(getattr(meta, key))}, wanted a whole number from 0 to 2**63 - 1"
    for key in ("config", "fingerprints", "versions", "world", "extra"):
        if not isinstance(getattr(meta, key), dict):
            yield f"{key} is {_shown(getattr(meta, key))}, wanted an object"
    try:
        lineage_of(meta.extra)
    except ValueError as error:
        yield str(error)


def _file_faults(name: str, file: TensorFile) -> Iterator[str]:
    if not _is_count(file.bytes) or not _is_count(file.header_crc32):
        yield f"{name} has {_shown(file.bytes)} bytes, wanted a whole number"
    end = 0
    for stored in file.stored:
        if fault := _rectangle_fault(stored, file.shapes[stored.tensor]):
            yield f"{name} holds {_shown(stored.tensor)} {fault}"
    for stored in sorted(file.stored, key=lambda stored: stored.offset):
        if not end and stored.offset > MAX_HEADER_BYTES:
            yield f"the header of {name} has {stored.offset} bytes, wanted at most {MAX_HEADER_BYTES}"
        if stored.offset < end:
            yield f"{name} holds two tensors at byte {stored.offset}"
        end = stored.offset + stored.rectangle.numel * DTYPES[file.dtypes[stored.tensor]].itemsize
    if end > file.bytes:
        yield f"the tensors of {name} end at byte {_shown(end)}, it has {file.bytes}"


def _rectangle_fault(stored: StoredRectangle, shape: tuple[int, ...]) -> str:
    start, extent = stored.rectangle.start, stored.rectangle.extent
    if not all(map(_is_count, (*start, *extent, stored.offset, *stored.checksums))):
        return "at a place that is not given in whole numbers"
    inside = len(start) == len(extent) == len(shape) and all(a + n <= full for a, n, full in zip(start, extent, shape))
    return "" if inside else f"from {_shown(start)} on, {_shown(extent)}, outside its shape {_shown(shape)}"


def _coverage_faults(manifest: CheckpointManifest) -> Iterator[str]:
    elements = dict.fromkeys(manifest.shapes, 0)
    for file in manifest.files.values():
        for stored in file.stored:
            elements[stored.tensor] += stored.rectangle.numel
    for name, count in elements.items():
        if count != math.prod(manifest.shapes[name]):
            yield f"the files hold {_shown(count)} elements of {_shown(name)}, whose shape is {_shown(manifest.shapes[name])}"


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _shown(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 256:  # Python writes out no number of more than 4,300 digits
        return f"a number of {value.bit_length()} bits"
    try:
        text = repr(value)
    except ValueError:  # such a number inside
        return "a number of thousands of digits"
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
