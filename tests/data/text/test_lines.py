import base64
import bz2
import codecs
import gzip
import io
import json
import random

import pyarrow as pa
import pytest

from data.text.documents import read_documents
from data.text.formats import InputPart, RejectedDocuments, TextFormat
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


@pytest.mark.parametrize("task_bytes", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["x.txt", "x.jsonl"])
def test_a_cut_inside_the_byte_order_mark_loses_no_line(tmp_path, name, task_bytes):
    lines = [json.dumps({"text": line}) for line in TEXT[:9]] if name.endswith("jsonl") else TEXT[:9]
    (tmp_path / name).write_bytes(codecs.BOM_UTF8 + "\n".join(lines).encode())
    assert read(tmp_path / name, task_bytes, text_documents="line") == TEXT[:9]


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


ROWS = [f"line {number} of the damaged file, {number * number}" for number in range(60)]
WHOLE = "".join(json.dumps({"text": row}) + "\n" for row in ROWS).encode()
ZSTD = base64.b85decode(
    "D77#B1Ze#T0CrR`7mzC*%MU#Dz6CR5(d6Dzrj$%N`K}E>GXN$4BmgvjmMlpm^4#s*joGSY{P`sTk%UU1phy@Bp>P;1282>TIEtZBs1z6pMN$Nb<56%V"
    "ko>v+nA58<HDlJQRn63UE%)awf0pP}nvbs!@6^z$#%hapJkJ7EYTbPN?}vUd!=A^;6B+4j@%*31Oyjb+ER#3UCf2m0iH;nANWybp-R$$)l$o}wlB<l@*U_oVv"
    "_-PAh^kbi_kMB@wdO|F9(Je^pq$V9-vQ7Yg$@z?3PD@I1b**W&X3&+5kGc|45G(w*;tE;)@r*2#e6=JOa?H2U+t&$EaWbZyD;v=I2U7G40mDNsX-!OB@b;G87"
    "Jr>h@a9mml{B-9{q5g"
)
"""WHOLE as `zstd -19 --check` writes it; Arrow writes no checksum."""
COMPRESSORS = {"gz": gzip.compress, "bz2": bz2.compress, "zst": lambda text: pa.compress(text, "zstd", asbytes=True)}


def damaged(content, draw):
    """(how, content) of a compressed file after what happens to files."""
    yield "junk at the end", content + b"junk and more of it"
    yield "junk at the end, like a second file", content + content[:20]
    yield "wrong checksum", content[:-6] + bytes([content[-6] ^ 1]) + content[-5:]
    yield "first block", content[:12] + bytes(200) + content[212:]
    yield "no such file", b"nothing of the kind"
    for size in draw.sample(range(1, len(content)), 20):
        yield f"cut to {size}", content[:size]
    for _ in range(60):
        at = draw.randrange(len(content))
        yield f"a bit of byte {at}", content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]


@pytest.mark.parametrize("text_documents", ["line", "file"])
@pytest.mark.parametrize(("ending", "compress"), COMPRESSORS.items())
def test_a_damaged_file_gives_nothing_that_is_not_in_it(tmp_path, ending, compress, text_documents):
    """What a stream gives after a fault is what memory held: rows of the files beside it."""
    kind = "jsonl" if text_documents == "line" else "txt"
    wanted, good = [*ROWS] if kind == "jsonl" else [WHOLE.decode()], []
    for name in "ac":
        rows = [f"{name} {number}" for number in range(200)]
        text = "".join(json.dumps({"text": row}) + "\n" for row in rows) if kind == "jsonl" else "".join(rows)
        (tmp_path / f"{name}.{kind}.{ending}").write_bytes(compress(text.encode()))
        good += rows if kind == "jsonl" else [text]
    text_format = TextFormat(on_error="skip")
    for how, content in damaged(ZSTD if ending == "zst" else compress(WHOLE), random.Random(0)):
        (tmp_path / f"b.{kind}.{ending}").write_bytes(content)
        rejected = RejectedDocuments("skip")
        [task] = plan_tasks([str(tmp_path)], text_format)
        found = sorted(text for part in task for text in read_documents(part, text_format, rejected))
        assert (found, dict(rejected.counts)) in [(sorted(good), {"unreadable file": 1}), (sorted(good + wanted), {})], how
        if rejected.counts:
            with pytest.raises(ValueError, match=r"/b\..*unreadable file; it is .*, or leave") as told:
                read(tmp_path / f"b.{kind}.{ending}", None)
            assert "\n" not in str(told.value), how


class Failing(io.RawIOBase):
    """A file whose reading fails once, and then continues with what is not in it."""

    def __init__(self, content: bytes) -> None:
        self.left, self.failed = content, False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        if not self.left and not self.failed:
            self.failed = True
            raise OSError("the disk is at fault")
        given = (self.left or b'{"text": "memory"}\n')[: len(buffer)]
        buffer[: len(given)], self.left = given, self.left[len(given) :]
        return len(given)


@pytest.mark.parametrize("text_documents", ["file", "line", "paragraph"])
@pytest.mark.parametrize("kind", ["jsonl", "text"])
@pytest.mark.parametrize("content", [b"", WHOLE[:7], WHOLE[:1500], WHOLE, b"x" * 3000], ids=len)
def test_nothing_is_read_after_a_fault(tmp_path, monkeypatch, content, kind, text_documents):
    """At the first look, in a line, between lines, and in a line that is skipped."""
    (tmp_path / "x").write_bytes(b"x")
    monkeypatch.setattr("data.text.lines._stream", lambda part: io.BufferedReader(Failing(content), 100))
    part, rejected = InputPart(str(tmp_path / "x"), kind, None, 0, 1 << 20, 1, "text"), RejectedDocuments("skip")
    found = list(read_documents(part, TextFormat(text_documents=text_documents, max_document_bytes=1500), rejected))
    assert not any("memory" in text for text in found) and rejected.counts["unreadable file"] == 1


def test_a_generous_limit_reserves_no_memory(tmp_path):
    (tmp_path / "a.txt").write_text("short")
    rejected, text_format = RejectedDocuments(), TextFormat(max_document_bytes=1 << 40)
    (task,) = plan_tasks([str(tmp_path)], text_format)
    assert list(read_documents(task[0], text_format, rejected)) == ["short"]
