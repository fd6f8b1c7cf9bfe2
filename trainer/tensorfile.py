"""One rank's tensors in one safetensors file: written in a stream with checksums, read back by rectangle."""

import json
import math
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Semaphore

import torch

from trainer.manifest import CHUNK_BYTES, DTYPES, Manifest, Stored, TensorFile
from trainer.rectangles import Box, Shard, check, own, pieces
from trainer.store import Source, Store

NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Piece:
    """One rectangle to be written: its tensor's name and full shape, its box, its values (flat); `steady` as in Shard."""

    tensor: str
    shape: tuple[int, ...]
    box: Box
    values: torch.Tensor
    steady: bool = False

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
            found += [Piece(shard.name, shard.shape, box, values, shard.steady) for box, values in pieces(mine)]
    return sorted(found, key=lambda piece: -piece.values.itemsize)


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


@dataclass(frozen=True)
class Chunk:
    """Bytes of a file under one checksum: the first, how many, their crc32; the memory they go to, or what takes them.

    Without `memory` they are read into a buffer of their own, which `use` is given when it has been checked.
    """

    place: int
    size: int
    checksum: int
    memory: memoryview | None = None
    use: Callable[[torch.Tensor], None] | None = None


def read_chunks(source: Source, label: str, tasks: list[Chunk], readers: int, beat: Callable[[], None] = lambda: None) -> None:
    """Read chunks in the order of the file, `readers` at once, and check each while others are read; `beat` after each.

    Reading and checking have threads of their own, so that the disk is never left waiting for a checksum. Twice
    `readers` chunks are in hand at most.

    Raises:
        ValueError: when a chunk is short or its checksum does not match.
    """
    room = Semaphore(2 * readers)

    def read(task: Chunk) -> Future[None]:
        room.acquire()
        buffer = None if task.memory is not None else torch.empty(task.size, dtype=torch.uint8)
        memory = task.memory if buffer is None else as_bytes(buffer)
        assert memory is not None
        try:
            short = source.read_into(task.place, memory) != task.size
        except BaseException:
            room.release()
            raise
        return checking.submit(check, task, short, memory, buffer)

    def check(task: Chunk, short: bool, memory: memoryview, buffer: torch.Tensor | None) -> None:
        try:
            if short or zlib.crc32(memory) != task.checksum:
                raise ValueError(
                    f"{label} is damaged: the checksum of bytes {task.place} to {task.place + task.size} does not match"
                )
            if task.use is not None and buffer is not None:
                task.use(buffer)
        finally:
            room.release()

    with ThreadPoolExecutor(readers) as checking, ThreadPoolExecutor(readers) as reading:
        for checked in reading.map(read, tasks):
            checked.result()
            beat()


def verify_file(
    store: Store, name: str, label: str, manifest: Manifest, file: TensorFile, beat: Callable[[], None] = lambda: None
) -> None:
    """Read a whole file and check every byte of it against the manifest; raises ValueError."""
    check_file(store, name, label, file)
    tasks = [Chunk(0, min((item.offset for item in file.stored), default=file.bytes), file.header)]
    for item in file.stored:
        parts = chunks(item.box, DTYPES[manifest.dtypes[item.tensor]].itemsize, manifest.chunk_bytes)
        tasks += [Chunk(item.offset + place, size, crc) for (_, place, size), crc in zip(parts, item.checksums, strict=True)]
    source = store.open(name)
    try:
        read_chunks(source, label, tasks, store.readers, beat)
    finally:
        source.close()


Wanted = dict[str, list[tuple[Box, torch.Tensor]]]
"""Tensor name -> the boxes a rank wants of it, each with the flat live values it fills."""


def read_tensors(store: Store, name: str, label: str, manifest: Manifest, file: TensorFile, wanted: Wanted) -> int:
    """Fill what a rank wants from one file; returns how many numbers were filled. Reads only chunks that are needed.

    Raises:
        ValueError: when the file is missing, short or damaged.
    """
    tasks, filled = [], 0
    for item in file.stored:
        targets = [(box, values) for box, values in wanted.get(item.tensor, ()) if box.meet(item.box)]
        if not targets:
            continue
        dtype = DTYPES[manifest.dtypes[item.tensor]]
        parts = chunks(item.box, dtype.itemsize, manifest.chunk_bytes)
        for (part, place, size), checksum in zip(parts, item.checksums, strict=True):
            hits = [(box, values, inner) for box, values in targets if (inner := box.meet(part))]
            if hits:
                tasks.append(_task(part, item.offset + place, size, checksum, dtype, hits))
                filled += sum(inner.numel for _, _, inner in hits)
    if not tasks:
        return 0
    check_file(store, name, label, file)
    source = store.open(name)
    try:
        read_chunks(source, label, tasks, store.readers)
    finally:
        source.close()
    return filled


def _task(
    part: Box, place: int, size: int, checksum: int, dtype: torch.dtype, hits: list[tuple[Box, torch.Tensor, Box]]
) -> Chunk:
    """A chunk goes straight into the values it fills where they lie alike; else through a buffer."""
    box, values, inner = hits[0]
    straight = box.view(part, values) if inner == part and len(hits) == 1 else None
    if straight is not None and straight.is_contiguous() and straight.dtype == dtype and straight.device.type == "cpu":
        return Chunk(place, size, checksum, memory=as_bytes(straight.reshape(-1)))

    def use(buffer: torch.Tensor) -> None:
        content = buffer.view(dtype)
        with torch.no_grad():  # which every thread has its own of
            for box, values, inner in hits:
                box.view(inner, values).copy_(part.view(inner, content))

    return Chunk(place, size, checksum, use=use)
