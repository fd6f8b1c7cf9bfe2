"""One rank's tensors in one safetensors file: written in a stream with checksums, read back by rectangle."""

import json
import math
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from trainer.manifest import CHUNK_BYTES, DTYPES, Manifest, Stored, TensorFile
from trainer.rectangles import Box, Shard, check, own, pieces
from trainer.store import Source, Store

NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Piece:
    """One rectangle to be written: its tensor's name and full shape, its box, its values (flat)."""

    tensor: str
    shape: tuple[int, ...]
    box: Box
    values: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return self.values.numel() * self.values.itemsize


def pieces_to_write(shards: list[Shard]) -> list[Piece]:
    """What this rank writes of its shards, wide numbers first so that all stay aligned.

    Raises:
        ValueError: for a shard that contradicts itself or a dtype a checkpoint cannot hold.
    """
    found = []
    for shard in shards:
        check(shard)
        if shard.values.dtype not in NAMES:
            raise ValueError(f"{shard.name} is {shard.values.dtype}; a checkpoint holds {', '.join(map(str, NAMES))}")
        mine = own(shard)
        if mine is not None:
            found += [Piece(shard.name, shard.shape, box, values) for box, values in pieces(mine)]
    return sorted(found, key=lambda piece: -piece.values.itemsize)


def copy_to_host(found: list[Piece], buffer: torch.Tensor | None) -> tuple[list[Piece], torch.Tensor]:
    """The same pieces with their values in host memory, so that training may go on while they are written.

    Returns the pieces and the buffer under them (bytes; pinned when the values lie on a GPU), to hand in next time.
    """
    total = sum(piece.nbytes for piece in found)
    on_gpu = any(piece.values.is_cuda for piece in found)
    if buffer is None or buffer.numel() != total:
        buffer = torch.empty(total, dtype=torch.uint8, pin_memory=on_gpu)
    copies, place = [], 0
    for piece in found:
        values = buffer[place : place + piece.nbytes].view(piece.values.dtype)
        values.copy_(piece.values, non_blocking=True)
        copies.append(Piece(piece.tensor, piece.shape, piece.box, values))
        place += piece.nbytes
    if on_gpu:
        torch.cuda.synchronize()
    return copies, buffer


def as_bytes(values: torch.Tensor) -> memoryview:
    """The memory of a flat, contiguous host tensor."""
    return values.view(torch.uint8).numpy().data


def chunks(box: Box, itemsize: int, chunk_bytes: int) -> Iterator[tuple[Box, int, int]]:
    """The parts of a stored box that have a checksum each: (box, first byte inside the box, bytes)."""
    place = 0
    for part in box.rows(max(1, chunk_bytes // itemsize)):
        yield part, place, part.numel * itemsize
        place += part.numel * itemsize


def write_tensors(store: Store, name: str, found: list[Piece]) -> TensorFile:
    """Write pieces as a safetensors file, durable on return. Checksums are computed beside the writing."""
    header = safetensors_header([(f"{p.tensor}{p.box}", NAMES[p.values.dtype], p.box.extent) for p in found])
    stored, place = [], len(header)
    sink = store.create(name)
    try:
        sink.write(header)
        with ThreadPoolExecutor(1) as beside:
            for piece in found:
                content = as_bytes(piece.values.cpu())
                parts = [content[a : a + n] for _, a, n in chunks(piece.box, piece.values.itemsize, CHUNK_BYTES)]
                sums = [beside.submit(zlib.crc32, part) for part in parts]
                for part in parts:
                    sink.write(part)
                stored.append(Stored(piece.tensor, piece.box, place, tuple(future.result() for future in sums)))
                place += len(content)
    finally:
        sink.close()
    dtypes = {piece.tensor: NAMES[piece.values.dtype] for piece in found}
    shapes = {piece.tensor: tuple(piece.shape) for piece in found}
    return TensorFile(place, zlib.crc32(header), tuple(stored), dtypes, shapes)


def safetensors_header(entries: list[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """What a safetensors file begins with when it holds these tensors (name, dtype, shape) one behind another."""
    table, place = {}, 0
    for name, dtype, shape in entries:
        size = math.prod(shape) * DTYPES[dtype].itemsize
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + size]}
        place += size
    assert len(table) == len(entries), "two tensors of one file have the same name"
    text = json.dumps({"__metadata__": {"format": "pt"}, **table}, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text


def check_file(store: Store, name: str, label: str, file: TensorFile) -> None:
    """Raise ValueError unless a file is there with the right length; `label` names it in the sentence."""
    try:
        size = store.size(name)
    except OSError:
        raise ValueError(f"{label} is missing") from None
    if size != file.bytes:
        raise ValueError(f"{label} has {size} bytes, its manifest says {file.bytes}")


def fetch(source: Source, label: str, place: int, checksum: int, buffer: memoryview) -> None:
    """Read one chunk and check it.

    Raises:
        ValueError: when it is short or its checksum does not match.
    """
    if source.read_into(place, buffer) != len(buffer) or zlib.crc32(buffer) != checksum:
        raise ValueError(f"{label} is damaged: the checksum of bytes {place} to {place + len(buffer)} does not match")


def verify_file(store: Store, name: str, label: str, manifest: Manifest, file: TensorFile, threads: int = 2) -> None:
    """Read a whole file and check every byte of it against the manifest; raises ValueError."""
    check_file(store, name, label, file)
    source = store.open(name)

    def look(task: tuple[int, int, int]) -> None:
        place, size, checksum = task
        fetch(source, label, place, checksum, memoryview(bytearray(size)))

    try:
        begin = min((item.offset for item in file.stored), default=file.bytes)
        tasks = [(0, begin, file.header)]
        for item in file.stored:
            itemsize = DTYPES[manifest.dtypes[item.tensor]].itemsize
            parts = chunks(item.box, itemsize, manifest.chunk_bytes)
            tasks += [(item.offset + place, size, total) for (_, place, size), total in zip(parts, item.checksums)]
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(look, tasks):
                pass
    finally:
        source.close()


Wanted = dict[str, list[tuple[Box, torch.Tensor]]]
"""Tensor name -> the boxes a rank wants of it, each with the flat live values it fills."""


def read_tensors(
    store: Store, name: str, label: str, manifest: Manifest, file: TensorFile, wanted: Wanted, threads: int = 4
) -> int:
    """Fill what a rank wants from one file; returns how many numbers were filled. Reads only chunks that are needed.

    Raises:
        ValueError: when the file is missing, short or damaged.
    """
    tasks = []
    for item in file.stored:
        targets = [(box, values) for box, values in wanted.get(item.tensor, ()) if box.meet(item.box)]
        if not targets:
            continue
        dtype = DTYPES[manifest.dtypes[item.tensor]]
        parts = chunks(item.box, dtype.itemsize, manifest.chunk_bytes)
        for (part, place, size), total in zip(parts, item.checksums, strict=True):
            hits = [(box, values) for box, values in targets if box.meet(part)]
            if hits:
                tasks.append((part, item.offset + place, size, total, dtype, hits))
    if not tasks:
        return 0
    check_file(store, name, label, file)
    source = store.open(name)
    try:
        with ThreadPoolExecutor(threads) as pool:
            return sum(pool.map(lambda task: _fill(source, label, *task), tasks))
    finally:
        source.close()


def _fill(source: Source, label: str, part: Box, place: int, size: int, checksum: int, dtype: torch.dtype, hits: list) -> int:
    box, values = hits[0]
    straight = box.view(part, values) if box.meet(part) == part else None
    if straight is not None and straight.is_contiguous() and straight.dtype == dtype and straight.device.type == "cpu":
        fetch(source, label, place, checksum, as_bytes(straight.reshape(-1)))
        return part.numel
    content = torch.empty(part.numel, dtype=dtype)
    assert size == math.prod(part.extent) * dtype.itemsize
    fetch(source, label, place, checksum, as_bytes(content))
    filled = 0
    for box, values in hits:
        inner = box.meet(part)
        assert inner is not None
        box.view(inner, values).copy_(part.view(inner, content))
        filled += inner.numel
    return filled
