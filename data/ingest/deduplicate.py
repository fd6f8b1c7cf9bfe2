"""Exact deduplication: of documents with equal text the first stays.

Two passes: each task writes a 16-byte key per document; then the keys are sorted, one slice of the key space at a time, and
each task gets a mask of the documents to keep. Beside the masks, memory holds the keys of one slice.
"""

import hashlib
from concurrent.futures import Executor
from typing import Any

import numpy as np

from data import storage
from data.text.documents import read_documents
from data.text.formats import InputPart, RejectedDocuments, TextFormat

KEY = np.dtype([("low", "<u8"), ("high", "<u8")])
SLICE_DOCUMENTS = 8 << 20  # keys sorted at once


def text_key(text: str) -> bytes:
    """BLAKE2b of the UTF-8 text, 16 bytes."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def keys_name(index: int) -> str:
    """File of the keys of a task's documents."""
    return f"keys-{index:06d}.bin"


def keep_name(index: int) -> str:
    """File of a task's mask."""
    return f"keep-{index:06d}.bin"


def keep_masks(executor: Executor, tasks: list[list[InputPart]], text_format: TextFormat, folder: str) -> None:
    """Write a mask in `folder` (one bool per document read) for every task N, unless an earlier run has written them all."""
    if storage.exists(storage.join_address(folder, "done")):
        return
    counts = list(executor.map(_write_keys, tasks, range(len(tasks)), [text_format] * len(tasks), [folder] * len(tasks)))
    slices = max(1, -(-sum(counts) // SLICE_DOCUMENTS))
    masks = [np.ones(count, bool) for count in counts]
    for number in range(slices):
        _mark_slice(folder, masks, number, slices)
    for index, mask in enumerate(masks):
        storage.write_atomic(storage.join_address(folder, keep_name(index)), mask.tobytes())
    storage.write_atomic(storage.join_address(folder, "done"), b"")


def _write_keys(parts: list[InputPart], index: int, text_format: TextFormat, folder: str) -> int:
    address = storage.join_address(folder, keys_name(index))
    if storage.exists(address):
        return len(storage.read_bytes(address)) // KEY.itemsize
    rejected = RejectedDocuments(text_format.on_error)
    keys = b"".join(text_key(text) for part in parts for text in read_documents(part, text_format, rejected))
    storage.write_atomic(address, keys)
    return len(keys) // KEY.itemsize


def _mark_slice(folder: str, masks: list[np.ndarray], number: int, slices: int) -> None:
    """Clear the mask of every document whose key, in this slice of the key space, an earlier document has."""
    columns: list[Any] = []  # (low, high, task, row) of each task's keys in this slice
    for index in range(len(masks)):
        keys = np.frombuffer(storage.read_bytes(storage.join_address(folder, keys_name(index))), KEY)
        rows = np.flatnonzero(keys["low"] % np.uint64(slices) == number)
        columns.append((keys["low"][rows], keys["high"][rows], np.full(len(rows), index), rows))
    low, high, task, row = (np.concatenate(column) for column in zip(*columns))
    order = np.lexsort((row, task, high, low))
    repeats = (low[order][1:] == low[order][:-1]) & (high[order][1:] == high[order][:-1])
    for index in order[1:][repeats]:
        masks[task[index]][row[index]] = False
