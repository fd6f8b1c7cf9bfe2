"""metrics.jsonl reads back bit for bit, and a full disk or a removed file loses no record."""

import errno
import json
import math
import re
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.storage import replace_file
from launch.commands.evaluate import append_records
from tests.trainer.sinks import fill, large_record, lines_only
from trainer.monitoring.config import LogConfig
from trainer.monitoring.jsonl import rescue_records
from trainer.monitoring.metrics import Metrics
from trainer.monitoring.records import FILE_NAME, read_records, truncate_records


@settings(max_examples=200, deadline=None)
@given(st.floats())
def test_a_float_reads_back_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, value: float):
    directory = tmp_path_factory.mktemp("run")
    metrics = lines_only(directory)
    metrics.record({"kind": "train", "step": 1, "loss": value})
    metrics.close()
    back = read_records(directory / FILE_NAME)[0]["loss"]
    same = math.isnan(back) if math.isnan(value) else (back == value and math.copysign(1, back) == math.copysign(1, value))
    assert same


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def test_every_line_is_json_and_text_stays_text(tmp_path: Path):
    numbers = {"loss": math.nan, "grad_norm": torch.tensor(math.inf), "mfu": -math.inf, "step_seconds": 1.5, "skipped": True}
    metrics = lines_only(tmp_path)
    metrics.record({"kind": "train", "step": 1, **numbers})
    metrics.record({"kind": "evaluate", "step": 1, "name": "NaN", "context": None, "loss": [math.nan, {"a": math.inf}]})
    metrics.text("sample", "Infinity", 1)
    metrics.close()
    lines = [json.loads(line, parse_constant=_refuse) for line in (tmp_path / FILE_NAME).read_text().splitlines()]
    written = {"loss": "NaN", "grad_norm": "Infinity", "mfu": "-Infinity", "step_seconds": 1.5, "skipped": True}
    assert lines[0] == {"kind": "train", "step": 1, **written}
    train, evaluation, text = read_records(tmp_path / FILE_NAME)
    assert math.isnan(train["loss"]) and train["grad_norm"] == math.inf and train["mfu"] == -math.inf
    assert evaluation["name"] == "NaN" and text["text"] == "Infinity"
    truncate_records(tmp_path / FILE_NAME, 1, replace_file)
    assert len(read_records(tmp_path / FILE_NAME)) == 3


def test_records_are_plain_json_lines(tmp_path: Path):
    metrics = lines_only(tmp_path)
    metrics.record({"kind": "train", "step": 1, "loss": 2.0})
    metrics.text("sample", "ünïcode\n", 1)
    metrics.close()
    lines = (tmp_path / FILE_NAME).read_text().splitlines()
    assert lines[0] == '{"kind": "train", "step": 1, "loss": 2.0}'
    assert json.loads(lines[1]) == {"kind": "text", "step": 1, "name": "sample", "text": "ünïcode\n"}


def test_tensors_are_written_as_their_number(tmp_path: Path):
    loss = torch.tensor(1.1)  # float32: its double is not 1.1
    metrics = lines_only(tmp_path)
    metrics.record({"kind": "train", "step": 1, "loss": loss, "skipped": torch.tensor(True)})
    metrics.close()
    assert read_records(tmp_path / FILE_NAME) == [{"kind": "train", "step": 1, "loss": loss.item(), "skipped": True}]


def test_every_finished_line_is_on_disk_before_close(tmp_path: Path):
    metrics = lines_only(tmp_path)
    metrics.record({"kind": "train", "step": 1})
    assert len(read_records(tmp_path / FILE_NAME)) == 1
    metrics.close()


class _SmallDisk:
    """A raw file on a disk with room for `room` bytes."""

    def __init__(self, file, room: int):
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        if self.room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self.file.write(data[: self.room])
        self.room -= written
        return written

    def fileno(self) -> int:
        return self.file.fileno()

    def truncate(self, size: int) -> None:
        self.file.truncate(size)

    def close(self):
        self.file.close()


def test_a_full_disk_loses_no_record_and_is_said(tmp_path: Path):
    said: list[str] = []
    metrics = lines_only(tmp_path, say=said.append)
    sink = metrics._sinks[0]
    disk = _SmallDisk(sink._file, room=30)
    sink._file = disk
    for step in (1, 2, 3):
        metrics.record({"kind": "train", "step": step, "loss": 0.5})
    assert len(said) == 1 and "No space left on device" in said[0] and "training is not affected" in said[0]
    assert not (tmp_path / FILE_NAME).read_bytes(), "a line whole or nothing of it: somebody else may add one meanwhile"
    disk.room = 10_000
    metrics.record({"kind": "train", "step": 4, "loss": 0.5})
    metrics.close()
    assert [record["step"] for record in read_records(tmp_path / FILE_NAME)] == [1, 2, 3, 4]


def test_a_file_that_somebody_removes_begins_again_and_it_is_said(tmp_path: Path):
    said: list[str] = []
    metrics = lines_only(tmp_path, say=said.append)
    for step in (1, 2, 3):
        metrics.record({"kind": "train", "step": step})
        if step == 1:
            (tmp_path / FILE_NAME).unlink()
    metrics.close()
    assert [record["step"] for record in read_records(tmp_path / FILE_NAME)] == [2, 3]
    assert said == [f"metrics: {tmp_path}/{FILE_NAME} was removed during the run; a new one begins with this record"]


def test_records_of_a_file_that_is_gone_are_brought_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As where the whole run directory was removed during the run."""
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    metrics = lines_only(tmp_path / "run", say=lambda sentence: None)
    (tmp_path / "run" / FILE_NAME).unlink()
    (tmp_path / "run").rmdir()
    metrics.record({"kind": "train", "step": 1})
    assert "1 are in" in metrics.flush_or_rescue()
    (tmp_path / "run").mkdir()
    rescue_records(tmp_path / "run" / FILE_NAME, replace_file)
    metrics.close()
    assert read_records(tmp_path / "run" / FILE_NAME) == [{"kind": "train", "step": 1}]


def test_records_that_find_no_room_at_the_end_are_kept_for_the_next_start(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    said: list[str] = []
    metrics = Metrics(replace_file, small_disk, LogConfig(tensorboard=False), config={}, say=said.append)
    filler = fill(small_disk)
    for step in range(1, 9):
        metrics.record(large_record(step, float(step)))
    lacking = f"{small_disk}/{FILE_NAME} lacks its last records (No space left on device)"
    assert re.fullmatch(
        rf"{re.escape(lacking)}; 8 are in \S+, from where the next start on this computer takes them", metrics.flush_or_rescue()
    )
    metrics.close()
    assert len(said) == 1 and "training is not affected, the records wait in memory" in said[0]
    filler.unlink()
    append_records(small_disk / FILE_NAME, [{"kind": "evaluate", "step": 8, "checkpoint": "step-8"}])  # by a command
    Metrics(replace_file, small_disk, LogConfig(tensorboard=False), config={}, from_step=8, say=said.append).close()
    assert [record["step"] for record in read_records(small_disk / FILE_NAME)] == [*range(1, 9), 8]
    assert not list(Path(tempfile.gettempdir()).glob(f"tiglon-*-{FILE_NAME}")), "taken back"
