"""One rank's tensors in one safetensors file: written in a stream with checksums, read back by rectangle."""

import json
import math
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from threading import Semaphore

import torch

from trainer.checkpoint.manifest import CHUNK_BYTES, DTYPES, CheckpointManifest, StoredRectangle, TensorFile
from trainer.checkpoint.rectangles import Rectangle, Shard, StepPart, check_shard, shard_rectangles, share_to_write
from trainer.checkpoint.store import ReadableFile, Store

NAMES = {dtype: name for name, dtype in DTYPES.items()}
"""torch's dtype -> safetensors' name."""

WantedRectangles = dict[str, list[tuple[Rectangle, torch.Tensor]]]
"""Tensor name -> the rectangles a rank wants of it, each with the flat live values it fills."""


@dataclass(frozen=True)
class StagedTensor:
    """One rectangle to be written: its tensor's name and full shape, its values (flat); `changes_in` as in Shard."""

    tensor: str
    shape: tuple[int, ...]
    rectangle: Rectangle
    values: torch.Tensor
    changes_in: StepPart = "accumulate"

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return self.values.numel() * self.values.itemsize


def tensors_to_write(shards: list[Shard]) -> list[StagedTensor]:
    """What this rank writes of its shards, wide dtypes first so that all stay aligned.

    Raises:
        ValueError: for a shard that contradicts itself or a dtype a checkpoint cannot hold.
    """
    tensors = []
    for shard in shards:
        check_shard(shard)
        if shard.values.dtype not in NAMES:
            raise ValueError(f"{shard.name} is {shard.values.dtype}; a checkpoint holds {', '.join(map(str, NAMES))}")
        share = share_to_write(shard)
        if share is not None:
            tensors += [
                StagedTensor(shard.name, shard.shape, rectangle, values, shard.changes_in)
                for rectangle, values in shard_rectangles(share)
            ]
    return sorted(tensors, key=lambda tensor: -tensor.values.itemsize)


def as_bytes(values: torch.Tensor) -> memoryview:
    """The memory of a flat, contiguous host tensor."""
    return values.view(torch.uint8).numpy().data


def checksum_chunks(rectangle: Rectangle, itemsize: int, chunk_bytes: int) -> Iterator[tuple[Rectangle, int, int]]:
    """The rows of a stored rectangle under one checksum each: (rectangle, offset of its first byte, bytes)."""
    offset = 0
    for chunk in rectangle.rows(max(1, chunk_bytes // itemsize)):
        yield chunk, offset, chunk.numel * itemsize
        offset += chunk.numel * itemsize


def write_tensors(store: Store, name: str, tensors: list[StagedTensor]) -> TensorFile:
    """Write tensors as a safetensors file, durable on return. Checksums are computed in a thread beside the writing."""
    header = safetensors_header([(f"{t.tensor}{t.rectangle}", NAMES[t.values.dtype], t.rectangle.extent) for t in tensors])
    stored, offset = [], len(header)
    file = store.create(name)
    try:
        file.write(header)
        with ThreadPoolExecutor(1) as checksums:
            for tensor in tensors:
                content = as_bytes(tensor.values.cpu())
                ranges = checksum_chunks(tensor.rectangle, tensor.values.itemsize, CHUNK_BYTES)
                chunks = [content[first : first + size] for _, first, size in ranges]
                futures = [checksums.submit(zlib.crc32, chunk) for chunk in chunks]
                for chunk in chunks:
                    file.write(chunk)
                crcs = tuple(future.result() for future in futures)
                stored.append(StoredRectangle(tensor.tensor, tensor.rectangle, offset, crcs))
                offset += len(content)
    finally:
        file.close()
    dtypes = {tensor.tensor: NAMES[tensor.values.dtype] for tensor in tensors}
    shapes = {tensor.tensor: tuple(tensor.shape) for tensor in tensors}
    return TensorFile(offset, zlib.crc32(header), tuple(stored), dtypes, shapes)


def safetensors_header(entries: list[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """The header of a safetensors file that holds these tensors (name, dtype, shape) one behind another."""
    table, offset = {}, 0
    for name, dtype, shape in entries:
        size = math.prod(shape) * DTYPES[dtype].itemsize
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
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
class ChunkRead:
    """Bytes of a file under one checksum: where they begin, how many, their crc32; the memory they go to, or what takes them.

    Without `memory` they are read into a buffer of their own, which `use` is given when it has been checked.
    """

    offset: int
    size: int
    checksum: int
    memory: memoryview | None = None
    use: Callable[[torch.Tensor], None] | None = None


def read_chunks(
    source: ReadableFile, label: str, chunks: list[ChunkRead], readers: int, heartbeat: Callable[[], None] = lambda: None
) -> None:
    """Read chunks in the order of the file, `readers` at once, and check each while others are read; `heartbeat` after each.

    Reading and checking have threads of their own, so that the disk is never left waiting for a checksum. At most twice
    `readers` chunks are in memory.

    Raises:
        ValueError: when a chunk is short or its checksum does not match.
    """
    in_memory = Semaphore(2 * readers)

    def read(chunk: ChunkRead) -> Future[None]:
        in_memory.acquire()
        buffer = None if chunk.memory is not None else torch.empty(chunk.size, dtype=torch.uint8)
        memory = chunk.memory if buffer is None else as_bytes(buffer)
        assert memory is not None
        try:
            short = source.read_into(chunk.offset, memory) != chunk.size
        except BaseException:
            in_memory.release()
            raise
        return checking.submit(check, chunk, short, memory, buffer)

    def check(chunk: ChunkRead, short: bool, memory: memoryview, buffer: torch.Tensor | None) -> None:
        try:
            if short or zlib.crc32(memory) != chunk.checksum:
                raise ValueError(
                    f"{label} is damaged: the checksum of bytes {chunk.offset} to {chunk.offset + chunk.size} does not match"
                )
            if chunk.use is not None and buffer is not None:
                chunk.use(buffer)
        finally:
            in_memory.release()

    with ThreadPoolExecutor(readers) as checking, ThreadPoolExecutor(readers) as reading:
        for checked in reading.map(read, chunks):
            checked.result()
            heartbeat()


def verify_file(store: Store, name: str, manifest: CheckpointManifest, heartbeat: Callable[[], None] = lambda: None) -> None:
    """Read a whole file and check every byte of it against the manifest; raises ValueError."""
    file = manifest.files[name]
    check_file(store, name, store.join(name), file)
    reads = [ChunkRead(0, min((stored.offset for stored in file.stored), default=file.bytes), file.header_crc32)]
    for stored in file.stored:
        reads += [
            ChunkRead(stored.offset + first, size, crc) for _, first, size, crc in _stored_chunks(store, name, manifest, stored)
        ]
    _read_file(store, name, reads, heartbeat)


def _stored_chunks(
    store: Store, name: str, manifest: CheckpointManifest, stored: StoredRectangle
) -> Iterator[tuple[Rectangle, int, int, int]]:
    """As `checksum_chunks`, each with its crc32. Raises ValueError where there are not as many of these."""
    chunks = checksum_chunks(stored.rectangle, DTYPES[manifest.dtypes[stored.tensor]].itemsize, manifest.chunk_bytes)
    for chunk, checksum in zip_longest(chunks, stored.checksums):
        if chunk is None or checksum is None:
            raise ValueError(f"{store.join(name)}: its manifest has not one checksum for each chunk of {stored.tensor}")
        rectangle, first, size = chunk
        yield rectangle, first, size, checksum


def _read_file(store: Store, name: str, reads: list[ChunkRead], heartbeat: Callable[[], None] = lambda: None) -> None:
    source = store.open(name)
    try:
        read_chunks(source, store.join(name), reads, store.readers, heartbeat)
    finally:
        source.close()


def read_tensors(store: Store, name: str, manifest: CheckpointManifest, wanted: WantedRectangles) -> int:
    """Fill what a rank wants from one file; returns how many elements were filled. Reads only chunks that are needed.

    Raises:
        ValueError: when the file is missing, short or damaged.
    """
    reads, filled = [], 0
    for stored in manifest.files[name].stored:
        targets = [target for target in wanted.get(stored.tensor, ()) if target[0].intersection(stored.rectangle)]
        if not targets:
            continue
        dtype = DTYPES[manifest.dtypes[stored.tensor]]
        for chunk, first, size, checksum in _stored_chunks(store, name, manifest, stored):
            overlaps = [(target, values, overlap) for target, values in targets if (overlap := target.intersection(chunk))]
            if overlaps:
                memory, use = _destination(chunk, dtype, overlaps)
                reads.append(ChunkRead(stored.offset + first, size, checksum, memory, use))
                filled += sum(overlap.numel for _, _, overlap in overlaps)
    if reads:
        check_file(store, name, store.join(name), manifest.files[name])
        _read_file(store, name, reads)
    return filled


def _destination(
    chunk: Rectangle, dtype: torch.dtype, overlaps: list[tuple[Rectangle, torch.Tensor, Rectangle]]
) -> tuple[memoryview | None, Callable[[torch.Tensor], None] | None]:
    """Where the bytes of a chunk go: straight into the values where both lie alike in memory, else through a buffer.

    Args:
        overlaps: (wanted rectangle, its flat values, what the chunk holds of it).
    """
    target, values, overlap = overlaps[0]
    direct = target.view(chunk, values) if overlap == chunk and len(overlaps) == 1 else None
    if direct is not None and direct.is_contiguous() and direct.dtype == dtype and direct.device.type == "cpu":
        return as_bytes(direct.reshape(-1)), None

    def use(buffer: torch.Tensor) -> None:
        content = buffer.view(dtype)
        with torch.no_grad():  # whose state is one per thread
            for target, values, overlap in overlaps:
                target.view(overlap, values).copy_(chunk.view(overlap, content))

    return None, use
