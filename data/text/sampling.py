"""Uniform samples of text in bounded memory: lines to train a tokenizer on, documents to measure bytes per token."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import numpy as np

from data.text.documents import read_documents
from data.text.formats import InputPart, RejectedDocuments, TextFormat, left_out_remark
from data.text.sources import check_fields, cut_tasks, find_files, plan_tasks

LINE_CHARACTERS = 4096
PART_BYTES, SAMPLE_POINTS = 1 << 20, 64
"""A sample of documents is drawn from at most SAMPLE_POINTS parts of PART_BYTES (larger where the format cannot be cut)."""


class Encoder(Protocol):
    """What `text_density` needs of a tokenizer."""

    def encode_array(self, text: str) -> np.ndarray: ...


@dataclass(frozen=True)
class LineSample:
    """Lines drawn from the documents of an input."""

    lines: list[str]
    seen: int  # lines drawn from
    remarks: list[str]  # a sentence for each kind of files or documents left out


def sample_lines(inputs: list[str], text_format: TextFormat, sample_bytes: int, seed: int) -> LineSample:
    """A uniform sample of the lines (no newline, cut to 4096 characters), `sample_bytes` characters in all.

    Each line draws a number in [0, 1) and is kept if it is below a threshold, which is halved whenever the kept lines exceed
    twice `sample_bytes`. The draws are seeded, so the same input gives the same sample.

    Raises ValueError for a sample that may hold no line, and as `find_files`, `cut_tasks` and `read_documents` do.
    """
    if sample_bytes < LINE_CHARACTERS:
        raise ValueError(f"sample_bytes = {sample_bytes}: give at least {LINE_CHARACTERS:,}, the length of a long line")
    rng, threshold = random.Random(seed), 1.0
    kept: list[tuple[float, str]] = []
    characters = seen = 0
    found, rejected = find_files(inputs), RejectedDocuments(text_format.on_error)
    check_fields(found, text_format)
    for line in _lines(cut_tasks(found, text_format), text_format, rejected):
        seen += 1
        drawn = rng.random()
        if drawn < threshold:
            kept.append((drawn, line))
            characters += len(line)
        while characters > sample_bytes * 2:
            threshold /= 2
            kept = [pair for pair in kept if pair[0] < threshold]
            characters = sum(len(line) for _, line in kept)
    if characters > sample_bytes:
        kept = _lower_threshold(kept, sample_bytes)
    remark = left_out_remark(rejected.counts)
    return LineSample([line for _, line in kept], seen, found.remarks() + ([remark] if remark else []))


@dataclass(frozen=True)
class TextDensity:
    """Bytes and tokens of the documents counted."""

    documents: int
    bytes: int  # of UTF-8 text
    tokens: int  # with the separator of each document, as `tiglon prepare` counts them
    whole: bool  # whether every document of the input was counted

    @property
    def bytes_per_token(self) -> float:
        """0 if there are no tokens."""
        return self.bytes / max(self.tokens, 1)


def text_density(
    tokenizer: Encoder, address: str, text_format: TextFormat, sample_bytes: int = 64 << 20, seed: int = 0
) -> TextDensity:
    """Bytes per token of an input as `tiglon prepare` measures them, or an estimate from a uniform sample of its documents.

    An input of up to `sample_bytes` is encoded as a whole; of a larger one about `sample_bytes`, spread over the input.
    Raises ValueError or FileNotFoundError as `plan_tasks` and `read_documents` do.
    """
    parts = [part for task in plan_tasks([address], text_format, PART_BYTES) for part in task]
    total = sum(part.bytes for part in parts)
    if total <= sample_bytes:
        return _count(tokenizer, text_format, [(part, 1.0) for part in parts], random.Random(seed), whole=True)
    chosen = _spread(parts, total, sample_bytes)
    density = _count(tokenizer, text_format, chosen, random.Random(seed), whole=False)
    if density.documents:
        return density
    return _count(tokenizer, text_format, [(part, 1.0) for part, _ in chosen], random.Random(seed), whole=False)


def _spread(parts: list[InputPart], total: int, sample_bytes: int) -> list[tuple[InputPart, float]]:
    """Parts, each with the share of its documents to count, so that every byte of the input has the same chance.

    Evenly spaced points over all bytes choose parts in proportion to their size; each point stands for an equal share.
    """
    chosen, end, point = [], 0, 0
    for part in parts:
        end += part.bytes
        points_inside = 0
        while point < SAMPLE_POINTS and (2 * point + 1) * total < 2 * SAMPLE_POINTS * end:
            point, points_inside = point + 1, points_inside + 1
        if points_inside:
            chosen.append((part, min(1.0, points_inside * sample_bytes / SAMPLE_POINTS / part.bytes)))
    return chosen


def _count(
    tokenizer: Encoder, text_format: TextFormat, chosen: list[tuple[InputPart, float]], rng: random.Random, whole: bool
) -> TextDensity:
    documents = size = tokens = 0
    rejected = RejectedDocuments(text_format.on_error)
    for part, share in chosen:
        for text in read_documents(part, text_format, rejected):
            if share < 1.0 and rng.random() >= share:
                continue
            documents += 1
            size += len(text.encode())
            tokens += len(tokenizer.encode_array(text)) + 1
    return TextDensity(documents, size, tokens, whole)


def _lower_threshold(kept: list[tuple[float, str]], sample_bytes: int) -> list[tuple[float, str]]:
    """The lines with the smallest draws, as many as fit into `sample_bytes`."""
    characters, threshold = 0, 0.0
    for drawn, line in sorted(kept):
        characters += len(line)
        if characters > sample_bytes:
            break
        threshold = drawn
    return [pair for pair in kept if pair[0] <= threshold]


def _lines(tasks: list[list[InputPart]], text_format: TextFormat, rejected: RejectedDocuments) -> Iterator[str]:
    for part in chain.from_iterable(tasks):
        for document in read_documents(part, text_format, rejected):
            for line in document.split("\n"):
                for start in range(0, len(line), LINE_CHARACTERS):
                    yield line[start : start + LINE_CHARACTERS]
