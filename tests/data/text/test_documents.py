import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.ingest.prepare import PrepareOptions, prepare
from data.text.documents import read_documents
from data.text.formats import RejectedDocuments, TextFormat
from data.text.sources import plan_tasks

GOOD = ["one", "two", "three"]


def read(inputs, on_error="skip", **reading):
    """(documents, what was left out)"""
    reading = TextFormat(on_error=on_error, **reading)
    faults = RejectedDocuments(on_error)
    found = [text for task in plan_tasks(inputs, reading) for piece in task for text in read_documents(piece, reading, faults)]
    return found, dict(faults.counts)


def write(path, kind):
    """Write a bad input of a kind; returns (reading options, documents still read, what is counted)."""
    lines = [json.dumps({"text": text}) for text in GOOD]
    match kind:
        case "broken line":
            path.write_text("\n".join([lines[0], '{"text": "cut', *lines[1:]]))
            return {}, GOOD, {"broken JSON": 1}
        case "missing field":
            path.write_text("\n".join([*lines, '{"other": "x"}', "[1]"]))
            return {}, GOOD, {"missing field": 1, "JSON array": 1}
        case "not text":
            path.write_text("\n".join([*lines, '{"text": 7}']))
            return {}, GOOD, {"not text": 1}
        case "surrogate":
            path.write_text("\n".join([*lines, '{"text": "\\ud800"}']))
            return {}, GOOD, {"invalid UTF-8": 1}
        case "long line":
            path.write_text("\n".join([lines[0], json.dumps({"text": "x" * 5000}), *lines[1:]]))
            return {"max_document_bytes": 100}, GOOD, {"line too long": 1}
        case "long other field":
            path.write_text("\n".join([lines[0], json.dumps({"html": "x" * 5000, "text": "y"}), *lines[1:]]))
            return {"max_document_bytes": 100}, GOOD, {"line too long": 1}
        case "long line of text":
            path.write_text("\n".join([GOOD[0], "x" * 5000, *GOOD[1:]]))
            return {"max_document_bytes": 100, "text_documents": "line"}, GOOD, {"document too long": 1}
        case "long text":
            path.write_text("\n".join([*lines, json.dumps({"text": "x" * 101})]))
            return {"max_document_bytes": 100}, GOOD, {"document too long": 1}
        case "truncated gzip":
            with pa.CompressedOutputStream(str(path), "gzip") as file:
                file.write("\n".join(lines * 20_000).encode())
            path.write_bytes(path.read_bytes()[:2000])
            return {}, None, {"unreadable file": 1}
        case "invalid UTF-8":
            path.write_bytes(b"one\n\xff\xfe\ntwo\nthree")
            return {"text_documents": "line"}, GOOD, {"invalid UTF-8": 1}
        case "truncated Parquet":
            pq.write_table(pa.table({"text": GOOD}), path)
            path.write_bytes(path.read_bytes()[:-20])
            return {}, [], {"unreadable Parquet": 1}
        case "damaged Parquet":
            pq.write_table(pa.table({"text": GOOD * 10_000}), path, compression="snappy", use_dictionary=False)
            data = bytearray(path.read_bytes())
            data[50:5000] = b"\xff" * 4950
            path.write_bytes(data)
            return {}, [], {"unreadable Parquet": 1}
        case "missing column":
            pq.write_table(pa.table({"body": GOOD}), path)
            return {}, [], {"no text column": 1}
        case "column of numbers":
            pq.write_table(pa.table({"text": [1, 2]}), path)
            return {}, [], {"no text column": 1}
        case _:
            raise ValueError(kind)


KINDS = {
    "x.jsonl": ["broken line", "missing field", "not text", "surrogate", "long line", "long other field", "long text"],
    "x.jsonl.gz": ["truncated gzip"],
    "x.txt": ["invalid UTF-8", "long line of text"],
    "x.parquet": ["truncated Parquet", "damaged Parquet", "missing column", "column of numbers"],
}


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kinds in KINDS.items() for kind in kinds])
def test_bad_input_is_refused_or_counted(tmp_path, name, kind):
    reading, documents, left_out = write(tmp_path / name, kind)
    found, counted = read([str(tmp_path)], **reading)
    assert counted == left_out
    assert documents is None or found == documents
    with pytest.raises(ValueError, match=f"{name}.*--on-error skip") as told:
        read([str(tmp_path)], "stop", **reading)
    assert "\n" not in str(told.value)


def test_null_and_empty_rows_are_counted(tmp_path):
    pq.write_table(pa.table({"text": ["one", None, "", "two", None, "three"]}), tmp_path / "x.parquet")
    assert read([str(tmp_path)], "stop") == (GOOD, {"null": 2, "empty": 1})


def test_mixed_schemas_keep_what_has_the_column(tmp_path):
    pq.write_table(pa.table({"text": GOOD}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": pa.array([b"four"], pa.large_binary()), "n": [1]}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"body": GOOD}), tmp_path / "c.parquet")
    assert read([str(tmp_path)]) == ([*GOOD, "four"], {"no text column": 1})
    with pytest.raises(ValueError, match="no column 'text' but body"):
        read([str(tmp_path)], "stop")


@pytest.mark.parametrize("count", range(95, 105))
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("text_documents", ["file", "line"])
def test_a_long_text_is_called_long_wherever_it_is_cut(tmp_path, count, newline, text_documents):
    """Up to three bytes of a character may stand behind the cut."""
    (tmp_path / "x.txt").write_bytes((newline + "a" * (count % 4) + "😀" * count).encode())
    found, counted = read([str(tmp_path)], text_documents=text_documents, max_document_bytes=99)
    assert found == [] and counted == {"document too long": 1, **({"empty": 1} if text_documents == "line" else {})}


@pytest.mark.parametrize(
    "long",
    ["x" * 5000, " " * 5000 + "x", "x" * 60 + "\n" + "y" * 60, "x\n" * 5000 + "y", "x\r\n" * 60 + "y", "x" * 100 + "\ny"],
)
def test_a_long_paragraph_is_left_out_as_a_whole(tmp_path, long):
    """And none of its lines is a document."""
    (tmp_path / "x.txt").write_bytes("\n\n".join(["one", long, "two", f"a\n{long}\nb"]).encode())
    found, counted = read([str(tmp_path)], text_documents="paragraph", max_document_bytes=100)
    assert found == ["one", "two"] and counted == {"document too long": 2}
    (tmp_path / "x.txt").write_bytes(b"x\r\n" * 50 + b"yz")
    assert read([str(tmp_path)], text_documents="paragraph", max_document_bytes=102) == (["x\n" * 50 + "yz"], {})


def test_a_line_that_is_too_long_is_told_from_a_text(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps({"html": "x" * 5000, "text": "y"}))
    with pytest.raises(ValueError, match=r"byte 0: line too long; .*take what is not text out of it, or raise --max-document-"):
        read([str(tmp_path)], "stop", max_document_bytes=100)


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl"])
def test_a_document_of_one_gigabyte_is_left_out_in_bounded_memory(tmp_path, name):
    with open(tmp_path / name, "wb") as file:
        file.truncate(1 << 30)
    found, counted = read([str(tmp_path / name)], max_document_bytes=1 << 20)
    assert (found, counted) == ([], {f"{'line' if name == 'x.jsonl' else 'document'} too long": 1})
    with pytest.raises(ValueError, match="--max-document-bytes"):
        read([str(tmp_path / name)], "stop", max_document_bytes=1 << 20)


def test_faults_are_counted_in_the_manifest(tmp_path, tokenizer_directory):
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"text": ""}\n{"tex\n{"text": null}\n')
    reading = TextFormat(on_error="skip")
    prepared = prepare(
        [str(tmp_path / "x.jsonl")],
        tokenizer_directory,
        str(tmp_path / "out"),
        PrepareOptions(validation_fraction=0, text_format=reading),
        workers=1,
    )
    assert prepared.manifests["train"].counts["left_out"] == {"empty": 1, "null": 1, "broken JSON": 1}
