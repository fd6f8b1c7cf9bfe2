"""Uniform samples of a corpus, in bounded memory: of its lines, to train tokenizers on; of its documents, to measure them."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from data.sources import Faults, Piece, Reading, plan_tasks, read_documents

LINE_CHARACTERS = 4096
STRETCH_BYTES, PLACES = 1 << 20, 64
"""A sample of documents is drawn from so many stretches of input of so many bytes (larger where the format cannot be cut)."""


class Encoder(Protocol):
    """The part of a tokenizer this needs."""

    def encode_array(self, text: str) -> np.ndarray: ...


def sample_lines(inputs: list[str], reading: Reading, sample_bytes: int, seed: int) -> tuple[list[str], int]:
    """Lines (of at most 4096 characters, no newline) of about `sample_bytes` in all, and how many lines were seen.

    Each line is kept with the same probability: it draws a number, and the threshold falls by a half whenever the kept
    lines outgrow the memory allowed. The draws are seeded, so the same input gives the same sample.
    """
    draw, threshold = random.Random(seed), 1.0
    kept: list[tuple[float, str]] = []
    held = seen = 0
    for line in _lines(inputs, reading):
        seen += 1
        number = draw.random()
        if number < threshold:
            kept.append((number, line))
            held += len(line)
        while held > sample_bytes * 2:
            threshold /= 2
            kept = [pair for pair in kept if pair[0] < threshold]
            held = sum(len(line) for _, line in kept)
    if held > sample_bytes:
        kept = _shorten(kept, sample_bytes)
    return [line for _, line in kept], seen


@dataclass(frozen=True)
class Density:
    """How much text a token stands for, over the documents counted."""

    documents: int
    bytes: int
    """Of UTF-8 text."""
    tokens: int
    """With the separator that ends each document, as `tiglon prepare` counts them."""
    whole: bool
    """Whether every document of the input was counted."""

    @property
    def bytes_per_token(self) -> float:
        """0 where there are no tokens."""
        return self.bytes / max(self.tokens, 1)


def density(tokenizer: Encoder, address: str, reading: Reading, sample_bytes: int = 64 << 20, seed: int = 0) -> Density:
    """Bytes per token of an input, as `tiglon prepare` would measure them, or an estimate from a uniform sample of documents.

    Args:
        sample_bytes: input up to this size is encoded whole; of a larger one about as much, from 64 places spread over it.
    """
    pieces = [piece for task in plan_tasks([address], reading, STRETCH_BYTES) for piece in task]
    total = sum(piece.bytes for piece in pieces)
    if total <= sample_bytes:
        return _count(tokenizer, reading, [(piece, 1.0) for piece in pieces], random.Random(seed), whole=True)
    chosen = _spread(pieces, total, sample_bytes)
    found = _count(tokenizer, reading, chosen, random.Random(seed), whole=False)
    if found.documents:
        return found
    return _count(tokenizer, reading, [(piece, 1.0) for piece, _ in chosen], random.Random(seed), whole=False)


def _spread(pieces: list[Piece], total: int, sample_bytes: int) -> list[tuple[Piece, float]]:
    """Pieces, each with the share of its documents to take, so that every byte of the input is taken with equal probability.

    Evenly spaced places over all bytes choose pieces in proportion to their size; each place stands for a like share.
    """
    chosen, end, place = [], 0, 0
    for piece in pieces:
        end += piece.bytes
        hits = 0
        while place < PLACES and (2 * place + 1) * total < 2 * PLACES * end:
            place, hits = place + 1, hits + 1
        if hits:
            chosen.append((piece, min(1.0, hits * sample_bytes / PLACES / piece.bytes)))
    return chosen


def _count(
    tokenizer: Encoder, reading: Reading, chosen: list[tuple[Piece, float]], draw: random.Random, whole: bool
) -> Density:
    documents = size = tokens = 0
    faults = Faults(reading.on_error)
    for piece, share in chosen:
        for text in read_documents(piece, reading, faults):
            if share < 1.0 and draw.random() >= share:
                continue
            documents += 1
            size += len(text.encode())
            tokens += len(tokenizer.encode_array(text)) + 1
    return Density(documents, size, tokens, whole)


def _shorten(kept: list[tuple[float, str]], sample_bytes: int) -> list[tuple[float, str]]:
    """Lower the threshold until what is kept fits."""
    held, threshold = 0, 0.0
    for number, line in sorted(kept):
        held += len(line)
        if held > sample_bytes:
            break
        threshold = number
    return [pair for pair in kept if pair[0] <= threshold]


def _lines(inputs: list[str], reading: Reading) -> Iterator[str]:
    faults = Faults(reading.on_error)
    for task in plan_tasks(inputs, reading):
        for piece in task:
            for document in read_documents(piece, reading, faults):
                for line in document.split("\n"):
                    for start in range(0, len(line), LINE_CHARACTERS):
                        yield line[start : start + LINE_CHARACTERS]
