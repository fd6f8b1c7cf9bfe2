import codecs
import json
import random

import pytest

from data.text.documents import read_documents
from data.text.formats import RejectedDocuments, TextFormat
from data.text.lines import foreign_encoding
from data.text.sources import plan_tasks

TEXT = [f"line {number} " + "äöü数😀"[number % 5] * (number % 7) for number in range(400)]


def read(path, task_bytes, **options):
    text_format, rejected = TextFormat(**options), RejectedDocuments()
    tasks = plan_tasks([str(path)], text_format, task_bytes)
    return [text for task in tasks for part in task for text in read_documents(part, text_format, rejected)]


@pytest.mark.parametrize("task_bytes", [5, 64, 1000, 1 << 20])
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("name", ["x.txt", "x.jsonl"])
def test_every_line_is_read_once_wherever_the_file_is_cut(tmp_path, name, newline, mark, task_bytes):
    lines = [json.dumps({"text": line}) for line in TEXT] if name.endswith("jsonl") else TEXT
    (tmp_path / name).write_bytes(mark + newline.join(lines).encode())
    assert read(tmp_path / name, task_bytes, text_documents="line") == TEXT


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32-be", "utf-8-sig", "gb18030"])
def test_another_encoding_gives_the_same_documents(tmp_path, monkeypatch, encoding):
    monkeypatch.setattr("data.text.lines.BUFFER_BYTES", 7)  # cuts inside characters
    (tmp_path / "x.txt").write_bytes(("\ufeff" * encoding.endswith("e") + "\r\n".join(TEXT)).encode(encoding))
    assert read(tmp_path / "x.txt", 100, text_documents="line", encoding=encoding) == TEXT
    assert read(tmp_path / "x.txt", 100, encoding=encoding) == ["\n".join(TEXT)]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_the_encoding_of_a_file_is_seen_at_its_beginning(encoding):
    wanted = "" if encoding.startswith("utf-8") else encoding
    assert foreign_encoding("Some words, and — more.\n".encode(encoding)) == wanted


def test_text_and_rubbish_are_not_taken_for_utf_16():
    draw = random.Random(0)
    assert foreign_encoding(b"") == foreign_encoding(b"a\0") == foreign_encoding(bytes(4096)) == ""
    assert foreign_encoding(b"one\0two three\0four") == ""
    for _ in range(100):
        assert foreign_encoding(bytes(draw.randrange(256) for _ in range(200))) == ""


def test_a_long_line_end_does_not_make_a_document_too_long(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"\r\n" * 50)
    assert read(tmp_path / "x.txt", 1 << 20, max_document_bytes=50) == ["\n" * 50]
    with pytest.raises(ValueError, match="--max-document-bytes"):
        read(tmp_path / "x.txt", 1 << 20, max_document_bytes=49)
