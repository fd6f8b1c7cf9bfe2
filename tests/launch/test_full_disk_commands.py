"""Commands on a disk without room, and with an object store that is gone: one sentence, status 1, and nothing half-written
that looks whole or stands in the way of the next try."""

import json
import os
import shutil
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from data.ingest.prepare import prepare
from data.text.documents import read_documents
from data.text.formats import InputPart, RejectedDocuments, TextFormat
from launch.cli import app
from launch.commands.evaluate import append_records
from launch.commands.export import export_model
from launch.program import status_and_sentence
from launch.standard_library import collect
from tests.launch.commands.test_export import network, saved
from tests.launch.commands.test_report import write_run
from tests.launch.test_full_disk import fill, small_disk  # noqa: F401 (a fixture)

ROOT = Path(__file__).parent.parent.parent
FULL = "No space left on device; make room there and run the same again"
GONE = "s3://bucket/x?endpoint_override=http%3A%2F%2F127.0.0.1%3A1&region=us-east-1"


def run(*arguments: object) -> tuple[int, str]:
    """Status and sentence of a command."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return status_and_sentence(result.exception) if result.exception else (0, "")


def leave_room(disk: Path, bytes_: int) -> None:
    """Fill a disk up to so many bytes (whole pages)."""
    fill(disk / "filler")
    os.truncate(disk / "filler", (disk / "filler").stat().st_size - bytes_)


def left(disk: Path) -> list[str]:
    """Files below, without the one that fills the disk."""
    return sorted(str(path.relative_to(disk)) for path in disk.rglob("*") if path.is_file() and path.name != "filler")


def megatron(prefix: Path, tokens: int) -> None:
    """A Megatron dataset of documents of a thousand tokens."""
    values = (np.arange(tokens) % 300 + 3).astype("<u2")
    values.tofile(prefix.with_suffix(".bin"))
    lengths = np.full(tokens // 1000, 1000, "<i4")
    starts = (np.arange(len(lengths)) * 2000).astype("<i8")
    bounds = np.arange(len(lengths) + 1).astype("<i8")
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, len(lengths), len(bounds))
    prefix.with_suffix(".idx").write_bytes(head + lengths.tobytes() + starts.tobytes() + bounds.tobytes())


def test_tokenizers_and_tokens(corpus: Path, tmp_path: Path, small_disk: Path):  # noqa: F811
    megatron(tmp_path / "tokens", 400_000)
    leave_room(small_disk, 4096)
    tokenizer = f"{corpus}/tokenizer"
    model = f"{tokenizer}/tokenizer.model"
    texts = sorted(str(path) for path in corpus.glob("*.txt"))
    for command, file in (
        (("tokenizer", "train", *texts, "--vocab-size", 330), "tokenizer.model"),
        (("tokenizer", "import", model), "tokenizer.model"),
        (("data", "import", tmp_path / "tokens", "--tokenizer", tokenizer), "train/shard-000000.arrow"),
    ):
        status, sentence = run(*command, "--output", small_disk / "out")
        assert (status, sentence) == (1, f"{small_disk}/out/{file}: {FULL}")
        assert left(small_disk) == []
    (small_disk / "filler").unlink()
    assert run("data", "import", tmp_path / "tokens", "--tokenizer", tokenizer, "--output", small_disk / "out") == (0, "")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_preparation_keeps_what_it_goes_on_from(workers: int, corpus: Path, tmp_path: Path, small_disk: Path):  # noqa: F811
    text = tmp_path / "text.txt"
    text.write_text("".join(path.read_text() for path in sorted(corpus.glob("*.txt"))) * 5)
    options = [text, "--tokenizer", f"{corpus}/tokenizer", "--text-documents", "line", "--task-bytes", 100_000]
    leave_room(small_disk, 300_000)
    status, sentence = run("prepare", *options, "--output", small_disk / "out", "--workers", workers)
    assert status == 1 and sentence.startswith(f"{small_disk}/out/") and sentence.endswith(FULL) and "\n" not in sentence
    kept = left(small_disk)
    assert "out/plan.json" in kept
    assert any(name.startswith("out/tasks/") for name in kept)  # of two workers, the first task's may be the one without room
    assert not [name for name in kept if name.endswith((".partial", "manifest.json"))]
    (small_disk / "filler").unlink()
    for output in (small_disk / "out", tmp_path / "whole"):
        assert run("prepare", *options, "--output", output) == (0, "")
    assert left(small_disk / "out") == left(tmp_path / "whole")
    for name in left(tmp_path / "whole"):
        assert (small_disk / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_models_leave_and_come_whole_or_not_at_all(tmp_path: Path, small_disk: Path):  # noqa: F811
    decoder, config = network({"tied_head": "plain"})
    saved(tmp_path, decoder, config)
    commands = {
        "exported": ("export", tmp_path, "--tokenizer", "none", "--output", small_disk / "exported"),
        "imported": ("import", tmp_path / "model", "--output", small_disk / "imported"),
    }
    export_model(str(tmp_path / "checkpoints/step-00000007"), tmp_path / "model", tokenizer="none")
    leave_room(small_disk, 40_000)
    for name, command in commands.items():
        assert run(*command) == (1, f"{small_disk}/{name}: {FULL}")
        assert os.listdir(small_disk) == ["filler"]
    (small_disk / "filler").unlink()
    assert [run(*command)[0] for command in commands.values()] == [0, 0]


def test_pages_and_scores(small_disk: Path):  # noqa: F811
    write_run(small_disk / "run")
    metrics = small_disk / "run/metrics.jsonl"
    leave_room(small_disk, 8192)
    assert run("report", small_disk / "run") == (1, f"{small_disk}/run/report/loss.png: {FULL}")
    assert [name for name in left(small_disk) if "report" in name] == []
    fill(small_disk / "more")
    before = metrics.read_bytes()
    records = [{"kind": "evaluate", "step": step, "text": "x" * 1000} for step in range(9)]
    with pytest.raises(OSError) as caught:
        append_records(metrics, records)
    assert status_and_sentence(caught.value) == (1, f"{metrics}: {FULL}")
    assert metrics.read_bytes() == before
    (small_disk / "more").unlink()
    append_records(metrics, records)
    assert metrics.read_bytes() == before + b"".join(json.dumps(record).encode() + b"\n" for record in records)


def test_the_library_as_a_program(small_disk: Path):  # noqa: F811
    shutil.copytree(ROOT / "data", small_disk / "library")
    leave_room(small_disk, 4096)
    with pytest.raises(OSError) as caught:
        collect(small_disk / "out/library.parquet", small_disk / "library")
    assert status_and_sentence(caught.value) == (1, f"{small_disk}/out/library.parquet: {FULL}")
    command = [sys.executable, "-m", "launch.standard_library", f"{small_disk}/out/library.parquet"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, f"tiglon: {small_disk}/out/library.parquet: {FULL}\n")
    assert not list((small_disk / "out").iterdir())


@pytest.mark.slow
def test_an_object_store_that_is_gone_is_one_sentence(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Also where unreadable documents are to be left out: a store that does not answer must not empty a corpus."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    faults = RejectedDocuments("skip")
    with ThreadPoolExecutor() as together:  # each waits six seconds for the store's library to give up
        asked = [
            together.submit(prepare, [GONE], f"{corpus}/tokenizer", str(tmp_path / "out")),
            together.submit(prepare, [f"{corpus}/*.txt"], f"{corpus}/tokenizer", GONE),
            together.submit(
                list, read_documents(InputPart(GONE, "parquet", None, 0, 1, 1, "text"), TextFormat(on_error="skip"), faults)
            ),
            together.submit(
                list, read_documents(InputPart(GONE, "text", None, 0, 1, 1, "text"), TextFormat(on_error="skip"), faults)
            ),
        ]
    for future in asked:
        error = future.exception()
        assert error is not None
        status, sentence = status_and_sentence(error)
        assert status == 1 and "\n" not in sentence and "127.0.0.1" in sentence
        assert sentence.startswith("'s3://bucket/")
        assert sentence.endswith("; check the address, the credentials and that the store answers")
    assert not faults.counts and not (tmp_path / "out").exists()
