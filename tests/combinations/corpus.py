"""Shards for the combinations: a part of the quickstart's text, its tokenizer small."""

import sysconfig
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data.ingest.prepare import prepare
from data.tokenizer.train import train_tokenizer
from launch.standard_library import sources

VOCABULARY = 512
FILES = {"shards": slice(0, 40), "more": slice(40, 41), "held-out": slice(60, 61)}
"""Folder -> files of Python's standard library."""
DOCUMENT = {"shards": 200, "more": 200, "held-out": 300}
"""Folder -> characters of a document. Those of training are so short that most rows of 64 tokens hold the end of one."""
DOCUMENTS = {"shards": 1000, "more": 4, "held-out": 4}
"""Folder -> documents of a file. `more` is read more than once in four steps and with it its last row, of which not every
target is scored: counts of targets are then not all the same power of two."""


def make(folder: Path) -> None:
    """Write tokenizer/ and, in a folder each, the shards."""
    found = [text for _, text in sources(Path(sysconfig.get_paths()["stdlib"]))]
    for name, part in FILES.items():
        texts = [document for text in found[part] for document in _documents(text, DOCUMENT[name])[: DOCUMENTS[name]]]
        text = folder / f"{name}.parquet"
        pq.write_table(pa.table({"text": texts}), text)
        if name == "shards":
            train_tokenizer([str(text)], str(folder / "tokenizer"), VOCABULARY)
        prepare([str(text)], str(folder / "tokenizer"), str(folder / name))


def _documents(text: str, characters: int) -> list[str]:
    return [text[i : i + characters] for i in range(0, len(text), characters)]
