"""Exact duplicates: of documents with equal text the first stays.

Two passes, memory bounded whatever the corpus: each task writes the 16-byte keys of its documents; then the keys are
sorted in slices of the key space that fit in memory, and each task gets a mask of the documents to keep.
"""

import hashlib
from concurrent.futures import Executor
from typing import Any

import numpy as np

from data import storage
from data.sources import Faults, Piece, Reading, read_documents

KEY = np.dtype([("low", "<u8"), ("high", "<u8")])
SLICE_DOCUMENTS = 8 << 20


def text_key(text: str) -> bytes:
    """16 bytes that name a text (BLAKE2b of its UTF-8)."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def keep_masks(executor: Executor, tasks: list[list[Piece]], reading: Reading, folder: str) -> None:
    """Write `keep-N.bin` (one bool a document) for every task N, unless an earlier run has."""
    if storage.exists(storage.join(folder, "done")):
        return
    counts = list(executor.map(_write_keys, tasks, range(len(tasks)), [reading] * len(tasks), [folder] * len(tasks)))
    slices = max(1, -(-sum(counts) // SLICE_DOCUMENTS))
    masks = [np.ones(count, bool) for count in counts]
    for part in range(slices):
        _mark_slice(folder, masks, part, slices)
    for index, mask in enumerate(masks):
        storage.write_whole(storage.join(folder, f"keep-{index:06d}.bin"), mask.tobytes())
    storage.write_whole(storage.join(folder, "done"), b"")


def _write_keys(pieces: list[Piece], index: int, reading: Reading, folder: str) -> int:
    address = storage.join(folder, f"keys-{index:06d}.bin")
    if storage.exists(address):
        return len(storage.read_bytes(address)) // KEY.itemsize
    faults = Faults(reading.on_error)
    keys = b"".join(text_key(text) for piece in pieces for text in read_documents(piece, reading, faults))
    storage.write_whole(address, keys)
    return len(keys) // KEY.itemsize


def _mark_slice(folder: str, masks: list[np.ndarray], part: int, slices: int) -> None:
    """Clear the mask of every repeated key among those of one slice of the key space."""
    found: list[Any] = []
    for index in range(len(masks)):
        keys = np.frombuffer(storage.read_bytes(storage.join(folder, f"keys-{index:06d}.bin")), KEY)
        rows = np.flatnonzero(keys["low"] % np.uint64(slices) == part)
        found.append((keys["low"][rows], keys["high"][rows], np.full(len(rows), index), rows))
    low, high, task, row = (np.concatenate(column) for column in zip(*found))
    order = np.lexsort((row, task, high, low))
    again = (low[order][1:] == low[order][:-1]) & (high[order][1:] == high[order][:-1])
    for which in order[1:][again]:
        masks[task[which]][row[which]] = False
