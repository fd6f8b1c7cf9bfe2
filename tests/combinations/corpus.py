"""Shards for the combinations: a part of the quickstart's text, its tokenizer small."""

import sysconfig
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data.prepare import prepare
from data.tokenizer import train_tokenizer
from launch.library import sources

VOCABULARY = 512
FILES = {"shards": slice(0, 40), "more": slice(40, 60), "held-out": slice(60, 61)}
"""Folder -> files of Python's standard library."""
HELD_OUT_BYTES = 2400


def make(folder: Path) -> None:
    """Write tokenizer/ and, in a folder each, the shards."""
    found = [text for _, text in sources(Path(sysconfig.get_paths()["stdlib"]))]
    for name, part in FILES.items():
        texts = found[part]
        if name == "held-out":
            texts = [text[i : i + HELD_OUT_BYTES // 4] for text in texts for i in range(0, HELD_OUT_BYTES, HELD_OUT_BYTES // 4)]
        text = folder / f"{name}.parquet"
        pq.write_table(pa.table({"text": texts}), text)
        if name == "shards":
            train_tokenizer([str(text)], str(folder / "tokenizer"), VOCABULARY)
        prepare([str(text)], str(folder / "tokenizer"), str(folder / name))
