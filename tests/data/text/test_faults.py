"""What is wrong with a file that cannot be read, in one sentence and the same for every kind."""

import errno
import gzip
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.text.documents import read_documents
from data.text.faults import unreadable
from data.text.formats import RejectedDocuments, TextFormat
from data.text.sources import plan_tasks

NAMES = ("x.jsonl", "x.jsonl.gz", "x.txt", "x.md.gz", "x.parquet", "x.arrow", "x.feather")


def write(path: Path) -> None:
    """A table or JSON lines of "one", "two", or text."""
    rows = {"text": ["one", "two"]}
    if path.suffix == ".parquet":
        pq.write_table(pa.table(rows), path)
    elif path.suffix in (".arrow", ".feather"):
        with (pa.ipc.new_file if path.suffix == ".feather" else pa.ipc.new_stream)(str(path), pa.table(rows).schema) as writer:
            writer.write_table(pa.table(rows))
    else:
        text = "".join(json.dumps({"text": row}) + "\n" for row in rows["text"]).encode()
        path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that any user may look into."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


@pytest.fixture
def plain_user():
    """The superuser is denied nothing."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    yield
    os.seteuid(before)


def read(folder: Path, on_error: str, task_bytes: int | None = None) -> tuple[list[str], dict[str, int]]:
    text_format, rejected = TextFormat(on_error=on_error), RejectedDocuments(on_error)  # type: ignore[arg-type]
    tasks = plan_tasks([str(folder)], text_format, task_bytes)
    return [text for task in tasks for part in task for text in read_documents(part, text_format, rejected)], dict(
        rejected.counts
    )


@pytest.mark.parametrize("task_bytes", [None, 5])
@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_may_not_be_read_is_counted_or_told(folder, request, name, task_bytes):
    write(folder / name)
    ending = "x.txt" if ".txt" in name or ".md" in name else "x.jsonl"
    write(folder / f"a{ending}")
    good, _ = read(folder, "skip", task_bytes)
    os.chmod(folder / name, 0)
    request.getfixturevalue("plain_user")
    found, counted = read(folder, "skip", task_bytes)
    assert counted == {"unreadable file": 1} and 0 < len(found) == len(good) // 2
    with pytest.raises(
        ValueError, match=rf"{name}: unreadable file; Permission denied: .*, or leave .* --on-error skip"
    ) as told:
        read(folder, "stop", task_bytes)
    assert "\n" not in str(told.value) and "--field" not in str(told.value)


@pytest.mark.parametrize("name", [*NAMES, "x.txt.zst", "x.jsonl.bz2"])
def test_a_pointer_of_git_lfs_is_told_under_any_name(folder, name):
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert read(folder, "skip") == ([], {"Git LFS pointer": 1})
    with pytest.raises(ValueError, match=rf"{name}: Git LFS pointer; it is not the file itself: run git lfs pull"):
        read(folder, "stop")


def test_the_systems_reason_comes_before_what_a_file_looks_like(tmp_path):
    (tmp_path / "x").write_bytes(b"")
    assert unreadable(str(tmp_path / "x"), "Arrow", OSError("cut")) == ("unreadable Arrow", "it is empty: copy it again")
    assert unreadable(str(tmp_path / "x"), "", OSError(errno.EIO, "x"))[1].startswith("Input/output error: ")
    with pytest.raises(OSError, match="cannot be used"):
        unreadable("s3://bucket/x", "", OSError("AWS Error SLOW_DOWN"))
    (tmp_path / "x").write_bytes(b"words")
    counted, remedy = unreadable(str(tmp_path / "x"), "", OSError("in\nflate"))
    assert counted == "unreadable file" and remedy == "it is no file that can be read (in flate): copy or write it again"
