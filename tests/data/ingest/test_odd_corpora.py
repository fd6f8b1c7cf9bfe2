"""Corpora as people have them: the right tokens, or one sentence that says what to do."""

import bz2
import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.corpus.shards import read_corpus_manifest
from data.ingest.prepare import PrepareOptions, prepare
from data.text.formats import TextFormat
from data.tokenizer.tokenizer import Tokenizer

GOOD = ["one", "two — ü", "three\n数据"]


def lines(*texts: str, key: str = "text") -> str:
    return "".join(json.dumps({key: text}) + "\n" for text in texts)


def table(path: Path, column: Any, name: str = "text") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({name: column}), path)


def arrow(path: Path, columns: dict[str, Any], kind: Callable = pa.ipc.new_stream) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = pa.table(columns)
    with kind(str(path), whole.schema) as writer:
        for batch in whole.to_batches(max_chunksize=2):
            writer.write_batch(batch)


@dataclass(frozen=True)
class Case:
    """A folder of text, and what comes of it."""

    write: Callable[[Path], Any]
    documents: list[str] | None = None
    """In order; None where the corpus is refused."""
    words: str = ""
    """Of the refusal."""
    left_out: dict[str, int] = field(default_factory=dict)
    files_left_out: dict[str, list[str]] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    inputs: tuple[str, ...] = (".",)


def several(*files: tuple[str, str | bytes]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for name, content in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return write


NESTED = {"id": 1, "content": {"body": "one", "meta": {"lang": "en"}}}
CASES = {
    # files that are no documents
    "README and LICENSE beside JSON lines": Case(
        several(("a.jsonl", lines(*GOOD)), ("README.md", "# read"), ("LICENSE.txt", "free"), ("LICENSE", "free")),
        GOOD,
        files_left_out={"text beside data": ["LICENSE.txt", "README.md"], "neither text nor data": ["LICENSE"]},
    ),
    "README above the data": Case(
        several(("data/a.jsonl", lines(*GOOD)), ("README.md", "# read"), ("notes/x.txt", "kept")),
        [*GOOD, "kept"],
        files_left_out={"text beside data": ["README.md"]},
    ),
    "README of a folder of text": Case(several(("a.txt", "one"), ("README.md", "two")), ["two", "one"]),
    "a README that is named": Case(
        several(("a.jsonl", lines("one")), ("README.md", "two")), ["one", "two"], inputs=("a.jsonl", "README.md")
    ),
    "a pattern that meets a README": Case(
        several(("a.jsonl", lines("one")), ("README.md", "two")),
        ["one"],
        files_left_out={"text beside data": ["README.md"]},
        inputs=("*",),
    ),
    "hidden files": Case(several(("a.jsonl", lines("one")), (".gitattributes", "x"), (".cache/b.jsonl", "broken")), ["one"]),
    "pictures beside data": Case(
        several(("a.jsonl", lines("one")), ("plot.png", b"\x89PNG"), ("meta.yaml", "a: 1")),
        ["one"],
        files_left_out={"neither text nor data": ["meta.yaml", "plot.png"]},
    ),
    "an unknown ending": Case(several(("a.jsonl", lines("one")), ("b.csv", "text\none")), words=r"b\.csv' is of no known kind"),
    "a folder of nothing to read": Case(several(("LICENSE", "x")), words="holds no text and no data, but LICENSE"),
    "an empty folder": Case(lambda folder: None, words="no files at"),
    "the same file twice": Case(several(("a.jsonl", lines("one"))), words="given twice", inputs=("a.jsonl", "../text/a.jsonl")),
    "a dataset of Hugging Face": Case(
        lambda folder: (
            arrow(folder / "data-00000-of-00001.arrow", {"text": GOOD}),
            several(("state.json", '{"_split": null}'), ("dataset_info.json", "{}"))(folder),
        ),
        GOOD,
        files_left_out={"neither text nor data": ["dataset_info.json", "state.json"]},
    ),
    "a dataset of Hugging Face after a map and a sort": Case(
        lambda folder: (
            arrow(folder / "data-00000-of-00001.arrow", {"text": GOOD}),
            arrow(folder / "cache-0a1b2c3d4e5f6789.arrow", {"text": GOOD}),
            arrow(folder / "cache-9a1b2c3d4e5f6789.arrow", {"indices": pa.array([2, 1, 0], pa.uint64())}),
        ),
        GOOD,
        files_left_out={
            "cache of Hugging Face's datasets": ["cache-0a1b2c3d4e5f6789.arrow", "cache-9a1b2c3d4e5f6789.arrow"],
        },
    ),
    "links in a folder": Case(
        lambda folder: (
            several(("a.txt", "one"))(folder),
            (folder / "b.txt").symlink_to("a.txt"),
            (folder / "c.txt").symlink_to("gone"),
        ),
        ["one"],
        files_left_out={"broken link": ["c.txt"], "link to another file of the input": ["b.txt"]},
    ),
    "splits of a dataset, by directory": Case(
        lambda folder: (
            arrow(folder / "train/data-00000-of-00001.arrow", {"text": GOOD}),
            arrow(folder / "test/data-00000-of-00001.arrow", {"text": GOOD}),
            several(("dataset_dict.json", '{"splits": ["train", "test"]}'))(folder),
        ),
        words="the splits test, train of a dataset.*/train'",
    ),
    "splits of a dataset, by name": Case(
        lambda folder: (
            table(folder / "data/train-00000-of-00001.parquet", GOOD),
            table(folder / "data/validation-00000-of-00001.parquet", GOOD),
        ),
        words=r"the splits train, validation of a dataset.*data/train\*'",
    ),
    "one split of a dataset": Case(
        lambda folder: (
            table(folder / "data/train-00000-of-00001.parquet", GOOD),
            table(folder / "data/validation-00000-of-00001.parquet", ["held out"]),
        ),
        GOOD,
        inputs=("data/train*",),
    ),
    "a Git LFS pointer as text": Case(
        several(("a.txt", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")), words="Git LFS pointer"
    ),
    "a Git LFS pointer, compressed": Case(
        several(("a.jsonl.gz", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")), words="Git LFS pointer"
    ),
    "a Git LFS pointer as Parquet": Case(
        several(("a.parquet", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")), words="Git LFS pointer"
    ),
    # lines and encodings
    "CRLF, files": Case(several(("a.txt", b"one\r\ntwo\r\n")), ["one\ntwo\n"]),
    "CRLF, lines": Case(several(("a.txt", b"one\r\ntwo\r\n")), ["one", "two"], options={"text_documents": "line"}),
    "CRLF, paragraphs": Case(
        several(("a.txt", b"one\r\ntwo\r\n\r\n \r\nthree\r\n")), ["one\ntwo", "three"], options={"text_documents": "paragraph"}
    ),
    "CRLF, JSON lines": Case(several(("a.jsonl", lines(*GOOD).replace("\n", "\r\n"))), GOOD),
    "CRLF inside JSON stays": Case(several(("a.jsonl", lines("one\r\ntwo"))), ["one\r\ntwo"]),
    "a mark, files": Case(several(("a.txt", "\ufeffone")), ["one"]),
    "a mark, lines": Case(several(("a.txt", "\ufeffone\ntwo")), ["one", "two"], options={"text_documents": "line"}),
    "a mark, JSON lines": Case(several(("a.jsonl", "\ufeff" + lines(*GOOD))), GOOD),
    "a mark, compressed": Case(several(("a.jsonl.gz", gzip.compress(("\ufeff" + lines(*GOOD)).encode()))), GOOD),
    "a mark and nothing": Case(several(("a.txt", "\ufeff"), ("b.txt", "one")), ["one"], left_out={"empty": 1}),
    "UTF-16 with a mark": Case(several(("a.txt", "one".encode("utf-16"))), words=r"it is UTF-16: .*--encoding utf-16"),
    "UTF-16 without a mark": Case(
        several(("a.jsonl", lines("one").encode("utf-16-be"))), words=r"it is UTF-16-BE: .*--encoding utf-16-be"
    ),
    "UTF-16, left out": Case(
        several(("a.txt", "one".encode("utf-16")), ("b.txt", "two")),
        ["two"],
        left_out={"not UTF-8": 1},
        options={"on_error": "skip"},
    ),
    "UTF-16, named": Case(several(("a.jsonl", lines(*GOOD).encode("utf-16"))), GOOD, options={"encoding": "utf-16"}),
    "UTF-32, named": Case(
        several(("a.txt", "\n".join(["one", "two — ü"]).encode("utf-32"))),
        ["one", "two — ü"],
        options={"encoding": "utf-32", "text_documents": "line"},
    ),
    "Latin-1": Case(several(("a.txt", "café".encode("latin-1"))), words=r"byte 0xe9 at 3 .*--encoding cp1252"),
    "Latin-1, named": Case(several(("a.txt", "café".encode("latin-1"))), ["café"], options={"encoding": "latin-1"}),
    "Latin-1, named, compressed": Case(
        several(("a.txt.bz2", bz2.compress("café\r\nà\r\n".encode("latin-1")))),
        ["café", "à"],
        options={"encoding": "latin-1", "text_documents": "line"},
    ),
    "another encoding than named": Case(
        several(("a.txt", b"one\x81")), words="another encoding.*cp1252|cp1252.*another|charmap", options={"encoding": "cp1252"}
    ),
    "an encoding that is none": Case(several(("a.txt", "one")), words="names no encoding", options={"encoding": "rot13"}),
    "invalid UTF-8 in JSON": Case(several(("a.jsonl", b'{"text": "\xff"}\n')), words="invalid UTF-8"),
    "invalid UTF-8 in JSON, left out": Case(
        several(("a.jsonl", b'{"text": "\xff"}\n' + lines(*GOOD).encode())),
        GOOD,
        left_out={"invalid UTF-8": 1},
        options={"on_error": "skip"},
    ),
    "zeros in text stay": Case(several(("a.txt", "one\0two and more of it")), ["one\0two and more of it"]),
    # JSON
    "a JSON array on a line": Case(several(("a.json", json.dumps([{"text": "one"}]))), words="JSON array.*jq"),
    "a JSON array over lines": Case(several(("a.json", json.dumps([{"text": "one"}], indent=1))), words="JSON array.*jq"),
    "a JSON object over lines": Case(
        several(("a.json", json.dumps({"text": "one"}, indent=1))), words="each document is one line"
    ),
    "a JSON text": Case(several(("a.jsonl", '"one"\n')), words="the line is a str"),
    "another field": Case(
        several(("a.jsonl", json.dumps(NESTED))), words=r"no field 'text' but id, content\.body, content\.meta\.lang"
    ),
    "a nested field": Case(several(("a.jsonl", json.dumps(NESTED))), ["one"], options={"field": "content.body"}),
    "a nested field that is null": Case(
        several(("a.jsonl", '{"content": null}\n{"content": {"body": null}}\n' + json.dumps(NESTED))),
        ["one"],
        left_out={"null": 2},
        options={"field": "content.body"},
    ),
    "a field with a dot in its name": Case(
        several(("a.jsonl", json.dumps({"content.body": "flat", **NESTED}))), ["flat"], options={"field": "content.body"}
    ),
    "a number too long for Python": Case(several(("a.jsonl", '{"text": ' + "9" * 5000 + "}\n")), words="broken JSON"),
    "a field for each input": Case(
        several(("a.jsonl", lines("one", key="body")), ("b/c.jsonl", lines("two")), ("d.txt", "three")),
        ["one", "two", "three"],
        options={"fields": (("a.jsonl", "body"),)},
        inputs=("a.jsonl", "b", "d.txt"),
    ),
    "a field for a folder": Case(
        several(("a.jsonl", lines("one")), ("b/c.jsonl", lines("two", key="body"))),
        ["one", "two"],
        options={"fields": (("b/", "body"),)},
    ),
    "a field for a pattern": Case(
        several(("a.jsonl", lines("one")), ("b/c.ndjson", lines("two", key="body"))),
        ["one", "two"],
        options={"fields": (("*.ndjson", "body"),)},
    ),
    "a field for files that are not there": Case(
        several(("a.jsonl", lines("one"))), words="is for no input file", options={"fields": (("b.jsonl", "body"),)}
    ),
    "a narrower field behind a wider one": Case(
        several(("b/c.jsonl", lines("one"))), words="is never used", options={"fields": (("b", "text"), ("b/c.jsonl", "x"))}
    ),
    "UTF-16 with another name": Case(
        several(("a.txt", "one".encode("utf-16"))), words="not latin-1; it is UTF-16", options={"encoding": "latin-1"}
    ),
    "UTF-8 with a mark and another name": Case(
        several(("a.txt", "\ufeffone")), words="not cp1252; it is UTF-8", options={"encoding": "cp1252"}
    ),
    # tables
    "string_view": Case(lambda folder: table(folder / "a.parquet", pa.array(GOOD, pa.string_view())), GOOD),
    "binary_view": Case(
        lambda folder: table(folder / "a.parquet", pa.array([t.encode() for t in GOOD], pa.binary_view())), GOOD
    ),
    "bytes of one length": Case(
        lambda folder: table(folder / "a.parquet", pa.array([b"abc", b"def"], pa.binary(3))), ["abc", "def"]
    ),
    "a column of nulls beside text": Case(
        lambda folder: (table(folder / "a.parquet", pa.nulls(3)), table(folder / "b.parquet", GOOD)), GOOD, left_out={"null": 3}
    ),
    "nothing but nulls": Case(lambda folder: table(folder / "a.parquet", pa.nulls(3)), words=r"no document .*'null': 3"),
    "a struct": Case(
        lambda folder: table(folder / "a.parquet", [NESTED, None, {"id": 2, "content": None}], "doc"),
        ["one"],
        left_out={"null": 2},
        options={"field": "doc.content.body"},
    ),
    "a struct that is not text": Case(
        lambda folder: table(folder / "a.parquet", [NESTED], "text"), words=r"is a struct: .*text\.content\.body"
    ),
    "another column": Case(
        lambda folder: table(folder / "a.parquet", [NESTED], "doc"), words=r"no column 'text' but doc\.id, doc\.content\.body"
    ),
    "a list of messages": Case(lambda folder: table(folder / "a.parquet", [["one"]]), words="holds list<.*>, not text"),
    "an empty file called Parquet": Case(several(("a.parquet", "")), words="it is empty"),
    "invalid UTF-8 in a table": Case(
        lambda folder: table(folder / "a.parquet", pa.array([b"one", b"\xff"]).view(pa.string())), words="row 1: invalid UTF-8"
    ),
    "an Arrow stream": Case(lambda folder: arrow(folder / "a.arrow", {"n": [1, 2, 3], "text": GOOD}), GOOD),
    "an Arrow file": Case(lambda folder: arrow(folder / "a.arrow", {"text": GOOD}, pa.ipc.new_file), GOOD),
    "an Arrow file of dictionaries": Case(
        lambda folder: arrow(folder / "a.feather", {"text": pa.array(GOOD).dictionary_encode()}, pa.ipc.new_file), GOOD
    ),
    "an Arrow file without the column": Case(
        lambda folder: arrow(folder / "a.arrow", {"body": GOOD}), words="no column 'text' but body.*--field"
    ),
    "an Arrow file cut short": Case(
        lambda folder: (
            arrow(folder / "a.arrow", {"text": GOOD}, pa.ipc.new_file),
            (folder / "a.arrow").write_bytes((folder / "a.arrow").read_bytes()[:-40]),
        ),
        words="no Arrow file that can be read",
    ),
    "shards of tiglon": Case(
        lambda folder: arrow(folder / "a.arrow", {"tokens": pa.array([[1, 2]], pa.large_list(pa.uint16()))}),
        words="no column 'text' but tokens",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_right_documents_or_one_sentence(tmp_path, tokenizer_directory, monkeypatch, name):
    case, folder = CASES[name], tmp_path / "text"
    folder.mkdir()
    case.write(folder)
    monkeypatch.chdir(folder)
    text_format = TextFormat(**case.options)

    def start() -> dict[str, Any]:
        text_format.check()
        options = PrepareOptions(validation_fraction=0, text_format=text_format)
        return prepare([*case.inputs], tokenizer_directory, str(tmp_path / "out"), options).manifests["train"].counts

    if case.documents is None:
        with pytest.raises((ValueError, FileNotFoundError), match=case.words) as told:
            start()
        assert "\n" not in str(told.value)
        return
    counts = start()
    tokenizer, found = Tokenizer.load(tokenizer_directory), []
    for shard in read_corpus_manifest(str(tmp_path / "out" / "train")).shards:
        rows = pa.ipc.open_file(str(tmp_path / "out" / "train" / shard.file)).read_all()["tokens"].to_pylist()
        assert all(row[-1] == tokenizer.end_of_text for row in rows)
        found += [tokenizer.decode(row[:-1]) for row in rows]
    assert found == case.documents
    assert counts["documents"] == len(found) and counts["left_out"] == case.left_out
    gone = {
        reason: [str(Path(file).relative_to(folder)) for file in files]
        for reason, files in counts.get("files_left_out", {}).items()
    }
    assert gone == case.files_left_out
