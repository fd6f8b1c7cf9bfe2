"""Bytes per token, of a whole input and of a sample of it."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from data.text import sampling
from data.text.formats import TextFormat
from data.text.sampling import LINE_CHARACTERS, sample_lines, text_density


class Letters:
    """A token for every character."""

    def encode_array(self, text: str) -> np.ndarray:
        return np.zeros(len(text), np.int32)


def write(path: Path, documents: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents))


def test_all_of_a_small_input_is_counted_with_its_separators(tmp_path: Path):
    write(tmp_path / "x.jsonl", ["aé", "", "bcd"])
    found = text_density(Letters(), str(tmp_path), TextFormat())
    assert (found.documents, found.bytes, found.tokens, found.whole) == (2, 6, 7, True)
    assert found.bytes_per_token == 6 / 7


@pytest.mark.parametrize("size", [-5, 0, 1, LINE_CHARACTERS - 1])
def test_a_sample_without_room_for_a_line_is_refused_before_anything_is_read(size: int):
    """A negative one halved its threshold for ever."""
    with pytest.raises(ValueError, match=f"sample_bytes = {size}: give at least 4,096"):
        sample_lines(["nowhere.txt"], TextFormat(), size, 0)


@pytest.mark.parametrize("size", [LINE_CHARACTERS, 10**30])
def test_a_sample_has_a_line_whatever_its_size(tmp_path: Path, size: int):
    write(tmp_path / "x.jsonl", ["a" * 9000] * 20)
    assert sample_lines([str(tmp_path)], TextFormat(), size, 0).lines


@pytest.mark.parametrize("stretch", [1 << 10, 1 << 15])
def test_a_sample_is_spread_over_the_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stretch: int):
    """The first half has one byte per character, the second two: a sample of a beginning would say 1."""
    monkeypatch.setattr(sampling, "PART_BYTES", stretch)
    draw = random.Random(0)
    halves = [[letter * draw.randint(1, 99) for _ in range(length)] for letter, length in (("a", 4000), ("é", 2000))]
    write(tmp_path / "x.jsonl", halves[0] + halves[1])
    whole = text_density(Letters(), str(tmp_path), TextFormat())
    found = text_density(Letters(), str(tmp_path), TextFormat(), sample_bytes=60_000)
    assert whole.whole and not found.whole and 40_000 < found.bytes < 70_000
    assert found.bytes_per_token == pytest.approx(whole.bytes_per_token, rel=0.04) and whole.bytes_per_token > 1.2


def test_a_sample_that_meets_no_document_reads_on(tmp_path: Path):
    write(tmp_path / "x.jsonl", ["a" * 100])
    assert text_density(Letters(), str(tmp_path), TextFormat(), sample_bytes=1).documents == 1
