"""A uniform sample of the lines of a corpus, in bounded memory: what tokenizers are trained on."""

import random
from collections.abc import Iterator
from typing import Protocol

from data.sources import Faults, Reading, plan_tasks, read_documents

LINE_CHARACTERS = 4096


class Encoder(Protocol):
    """The part of a tokenizer this needs."""

    def encode(self, text: str) -> list[int]: ...


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


def bytes_per_token(tokenizer: Encoder, address: str, reading: Reading, read_bytes: int = 1 << 20) -> float:
    """Bytes of UTF-8 a token stands for in the first part of an input."""
    size = tokens = 0
    for line in _lines([address], reading):
        size += len(line.encode()) + 1
        tokens += len(tokenizer.encode(line + "\n"))
        if size > read_bytes:
            break
    return size / max(tokens, 1)


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
