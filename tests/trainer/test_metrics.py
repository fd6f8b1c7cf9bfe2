"""metrics.jsonl reads back bit for bit and survives kills and full disks; the other pens see the same numbers."""

import errno
import json
import math
import re
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launch.read import append
from trainer.metrics import FILE_NAME, Metrics, bring_back, keep_until, read_records


def _lines_only(directory: Path, **settings_) -> Metrics:
    return Metrics(directory, tensorboard=False, wandb="", config={}, **settings_)


@settings(max_examples=200, deadline=None)
@given(st.floats())
def test_a_float_reads_back_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, value: float):
    directory = tmp_path_factory.mktemp("run")
    metrics = _lines_only(directory)
    metrics.record({"kind": "train", "step": 1, "loss": value})
    metrics.close()
    back = read_records(directory / FILE_NAME)[0]["loss"]
    same = math.isnan(back) if math.isnan(value) else (back == value and math.copysign(1, back) == math.copysign(1, value))
    assert same


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def test_every_line_is_json_and_text_stays_text(tmp_path: Path):
    numbers = {"loss": math.nan, "grad_norm": torch.tensor(math.inf), "mfu": -math.inf, "step_seconds": 1.5, "skipped": True}
    metrics = _lines_only(tmp_path)
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
    keep_until(tmp_path / FILE_NAME, 1)
    assert len(read_records(tmp_path / FILE_NAME)) == 3


def test_lines_of_an_older_tiglon_are_read(tmp_path: Path):
    (tmp_path / FILE_NAME).write_text('{"kind": "train", "step": 1, "loss": NaN, "grad_norm": Infinity}\n')
    assert math.isnan(read_records(tmp_path / FILE_NAME)[0]["loss"])


def test_tensors_are_written_as_their_number(tmp_path: Path):
    loss = torch.tensor(1.1)  # float32: its double is not 1.1
    metrics = _lines_only(tmp_path)
    metrics.record({"kind": "train", "step": 1, "loss": loss, "skipped": torch.tensor(True)})
    metrics.close()
    assert read_records(tmp_path / FILE_NAME) == [{"kind": "train", "step": 1, "loss": loss.item(), "skipped": True}]


def test_every_finished_line_is_on_disk_before_close(tmp_path: Path):
    metrics = _lines_only(tmp_path)
    metrics.record({"kind": "train", "step": 1})
    assert len(read_records(tmp_path / FILE_NAME)) == 1
    metrics.close()


@settings(deadline=None)  # it writes files, and computers are busy
@given(written=st.integers(0, 12), resumed=st.integers(0, 12), torn=st.booleans())
def test_an_interrupted_and_resumed_run_equals_the_unbroken_one(
    tmp_path_factory: pytest.TempPathFactory, written: int, resumed: int, torn: bool
):
    directory = tmp_path_factory.mktemp("run")
    whole = [{"kind": "train", "step": step, "loss": 1 / step} for step in range(1, 13)]
    resumed = min(resumed, written)
    metrics = _lines_only(directory)
    for record in whole[:written]:
        metrics.record(record)
    metrics.close()
    if torn:
        with open(directory / FILE_NAME, "a") as file:
            file.write('{"kind": "train", "st')
    metrics = _lines_only(directory, from_step=resumed)
    for record in whole[resumed:]:
        metrics.record(record)
    metrics.close()
    assert read_records(directory / FILE_NAME) == whole
    assert [path.name for path in directory.iterdir()] == [FILE_NAME]


def test_kept_lines_do_not_change_by_a_byte(tmp_path: Path):
    path = tmp_path / FILE_NAME
    path.write_text('{"step":1,  "loss": 0.10}\n{"step": 2}\n')
    keep_until(path, 1)
    assert path.read_text() == '{"step":1,  "loss": 0.10}\n'


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path):
    path = tmp_path / FILE_NAME
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"line 2 is not a JSON record"):
        read_records(path)


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
    metrics = _lines_only(tmp_path, say=said.append)
    pen = metrics._pens[0]
    disk = _SmallDisk(pen._file, room=30)
    pen._file = disk
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
    metrics = _lines_only(tmp_path, say=said.append)
    for step in (1, 2, 3):
        metrics.record({"kind": "train", "step": step})
        if step == 1:
            (tmp_path / FILE_NAME).unlink()
    metrics.close()
    assert [record["step"] for record in read_records(tmp_path / FILE_NAME)] == [2, 3]
    assert said == [f"metrics: {tmp_path}/{FILE_NAME} was removed while the run was going on; it begins again here"]


def test_records_of_a_file_that_is_gone_are_brought_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As where the whole run directory was removed while the run was going on."""
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    metrics = _lines_only(tmp_path / "run", say=lambda sentence: None)
    (tmp_path / "run" / FILE_NAME).unlink()
    (tmp_path / "run").rmdir()
    metrics.record({"kind": "train", "step": 1})
    assert "1 are in" in metrics.secure()
    (tmp_path / "run").mkdir()
    bring_back(tmp_path / "run" / FILE_NAME)
    metrics.close()
    assert read_records(tmp_path / "run" / FILE_NAME) == [{"kind": "train", "step": 1}]


def test_ranks_without_a_directory_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    metrics = Metrics(None, tensorboard=True, wandb="project", config={})
    metrics.record({"kind": "train", "step": 1})
    metrics.text("sample", "text", 1)
    metrics.close()
    assert not list(tmp_path.iterdir())


def test_tensorboard_shows_scalars_health_and_the_sample(tmp_path: Path):
    metrics = Metrics(tmp_path, tensorboard=True, wandb="", config={"train": {"steps": 2}})
    metrics.record({"kind": "train", "step": 1, "loss": 3.5, "skipped": False})
    metrics.record({"kind": "evaluate", "step": 1, "name": "validation", "context": 256, "loss": 4.5})
    metrics.record({"kind": "health", "step": 1, "what": "spike", "action": "skip"})
    metrics.text("sample", "def f():", 1)
    metrics.close()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.value for event in board.Scalars("train/loss")] == [3.5]
    assert [event.value for event in board.Scalars("evaluate/validation/256/loss")] == [4.5]
    assert set(board.Tags()["scalars"]) == {"train/loss", "train/skipped", "evaluate/validation/256/loss"}
    texts = {tag: board.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in board.Tags()["tensors"]}
    assert "def f():" in texts["sample/text_summary"]
    assert texts["health/text_summary"] == "spike (skip)"
    assert '"steps": 2' in texts["config/text_summary"]


def test_tensorboard_forgets_what_came_after_the_resumed_step(tmp_path: Path):
    for from_step, steps in ((0, (1, 2, 3, 4)), (2, (3, 4))):
        metrics = Metrics(tmp_path, tensorboard=True, wandb="", config={}, from_step=from_step)
        for step in steps:
            metrics.record({"kind": "train", "step": step, "loss": float(step + from_step)})
            metrics.text("sample", "def", step)
        metrics.close()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("train/loss")] == [(1, 1.0), (2, 2.0), (3, 5.0), (4, 6.0)]
    samples = [event.step for event in board.Tensors("sample/text_summary")]
    assert samples.count(1) == 1, "what was there before the resumed step is not written again"


def _both(directory: Path) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """(step, loss) of the training records in TensorBoard and in metrics.jsonl."""
    board = EventAccumulator(str(directory / "tensorboard")).Reload()
    lines = [(r["step"], r["loss"]) for r in read_records(directory / FILE_NAME) if r["kind"] == "train"]
    return [(event.step, event.value) for event in board.Scalars("train/loss")], lines


def test_a_run_that_begins_again_leaves_no_trace_of_the_earlier_one(tmp_path: Path):
    for steps in (range(1, 14), range(1, 7)):
        metrics = Metrics(tmp_path, tensorboard=True, wandb="", config={})
        for step in steps:
            metrics.record({"kind": "train", "step": step, "loss": float(step + len(steps))})
        metrics.close()
    assert _both(tmp_path) == ([(step, float(step + 6)) for step in range(1, 7)],) * 2


def test_after_a_rewind_both_show_the_new_steps_and_every_rewind(tmp_path: Path):
    metrics = Metrics(tmp_path, tensorboard=True, wandb="", config={})
    for step in range(1, 7):
        metrics.record({"kind": "train", "step": step, "loss": float(step)})
    rewinds = [{"kind": "health", "step": step, "what": "spike", "action": "rewind"} for step in (6, 5)]
    for number, rewind in enumerate(rewinds, start=1):
        metrics.back_to(4)
        for record in rewinds[:number]:  # trainer/loop.py knows them
            metrics.record(record)
        metrics.record({"kind": "train", "step": 5, "loss": 50.0 + rewind["step"]})
    metrics.record({"kind": "train", "step": 6, "loss": 60.0})
    metrics.close()
    wanted = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 55.0), (6, 60.0)]
    assert _both(tmp_path) == (wanted, wanted)
    assert [record for record in read_records(tmp_path / FILE_NAME) if record["kind"] == "health"] == rewinds
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {event.step for event in board.Tensors("health/text_summary")} == {5, 6}, "of texts it forgets none"


def test_tensorboard_gets_back_what_a_kill_took_from_it(tmp_path: Path):
    """Up to the save everything was flushed; what was looked at after it may have reached metrics.jsonl only."""
    metrics = Metrics(tmp_path, tensorboard=True, wandb="", config={})
    metrics.record({"kind": "train", "step": 4, "loss": 4.0})
    metrics.flush()
    with open(tmp_path / FILE_NAME, "a") as file:
        file.write('{"kind": "evaluate", "step": 4, "name": "validation", "context": 8, "loss": "NaN"}\n')
        file.write('{"kind": "text", "step": 4, "name": "sample", "text": "def"}\n')
    resumed = Metrics(tmp_path, tensorboard=True, wandb="", config={}, from_step=4)
    assert [record["kind"] for record in resumed.last] == ["train", "evaluate", "text"]
    resumed.close()
    metrics.close()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("evaluate/validation/8/loss")] == [4]
    assert [event.step for event in board.Scalars("train/loss")] == [4]
    assert "sample/text_summary" in board.Tags()["tensors"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """1 MB of memory as a file system of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tiglon", place], capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a file system")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def _fill(place: Path) -> Path:
    """Write until nothing more fits; the file to remove for room again."""
    filler = place / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(1000)):
            pass
    return filler


def _large(step: int, loss: float) -> dict:
    """A training record of about 2 kB."""
    return {"kind": "train", "step": step, "loss": loss, **{f"more{n}": 0.5 for n in range(200)}}


_ITS_OWN_WRITER = "ignore::pytest.PytestUnhandledThreadExceptionWarning"  # of TensorBoard fails in a thread


@pytest.mark.filterwarnings(_ITS_OWN_WRITER)
def test_tensorboard_makes_up_for_a_disk_that_was_full(small_disk: Path):
    said: list[str] = []
    metrics = Metrics(small_disk, tensorboard=True, wandb="", config={}, say=said.append)
    for step in range(1, 31):
        if step == 11:
            filler = _fill(small_disk)
        metrics.record(_large(step, float(step)))
        if step % 5 == 0:
            metrics.flush()
        if step == 20:
            filler.unlink()
    metrics.close()
    wanted = [(step, float(step)) for step in range(1, 31)]
    assert _both(small_disk) == (wanted, wanted)
    assert [sum(f"{name} cannot be written" in text for text in said) for name in ("tensorboard", FILE_NAME)] == [1, 1]


@pytest.mark.filterwarnings(_ITS_OWN_WRITER)
@pytest.mark.parametrize("from_step", [0, 6])
def test_tensorboard_is_made_up_for_by_the_run_that_resumes(small_disk: Path, from_step: int):
    """A disk that is full to the end, checkpoints elsewhere: the next run begins after what is missing."""
    with closing(Metrics(small_disk, tensorboard=True, wandb="", config={})) as metrics:  # whole until later
        for step in range(1, 13):
            metrics.record(_large(step, step + 100.0 * (step > from_step)))
    metrics = Metrics(small_disk, tensorboard=True, wandb="", config={}, from_step=from_step, say=lambda sentence: None)
    filler = _fill(small_disk)
    for step in range(from_step + 1, 11):
        metrics.record(_large(step, float(step)))
    metrics.flush()
    assert "tensorboard lacks its last records" in metrics.secure()
    metrics.close()
    filler.unlink()
    bring_back(small_disk / FILE_NAME)
    with closing(Metrics(small_disk, tensorboard=True, wandb="", config={}, from_step=10)) as metrics:
        metrics.record(_large(11, 11.0))
    wanted = [(step, float(step)) for step in range(1, 12)]
    assert _both(small_disk) == (wanted, wanted)


@pytest.mark.filterwarnings(_ITS_OWN_WRITER)
def test_a_rewind_on_a_full_disk_is_made_up_for(small_disk: Path):
    metrics = Metrics(small_disk, tensorboard=True, wandb="", config={}, say=lambda sentence: None)
    for step in range(1, 9):
        if step == 7:
            filler = _fill(small_disk)
        metrics.record(_large(step, float(step)))
    metrics.flush()
    rewind = {"kind": "health", "step": 8, "what": "spike", "action": "rewind"}
    metrics.back_to(4)
    metrics.record(rewind)
    for step in range(5, 8):
        metrics.record(_large(step, 10.0 + step))
    assert [record["step"] for record in read_records(small_disk / FILE_NAME)][:6] == [1, 2, 3, 4, 5, 6], "as it was"
    filler.unlink()
    assert metrics.secure() == ""
    metrics.close()
    wanted = [(step, step + 10.0 * (step > 4)) for step in range(1, 8)]
    assert _both(small_disk) == (wanted, wanted)
    assert [record for record in read_records(small_disk / FILE_NAME) if record["kind"] == "health"] == [rewind]
    assert not list(small_disk.glob("*.new"))


@pytest.mark.filterwarnings(_ITS_OWN_WRITER)
def test_records_that_find_no_room_at_the_end_are_kept_for_the_next_start(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    said: list[str] = []
    metrics = Metrics(small_disk, tensorboard=False, wandb="", config={}, say=said.append)
    filler = _fill(small_disk)
    for step in range(1, 9):
        metrics.record(_large(step, float(step)))
    lacking = f"{small_disk}/{FILE_NAME} lacks its last records (No space left on device)"
    assert re.fullmatch(
        rf"{re.escape(lacking)}; 8 are in \S+, from where the next start on this computer takes them", metrics.secure()
    )
    metrics.close()
    assert len(said) == 1 and "training is not affected, the records wait in memory" in said[0]
    filler.unlink()
    append(small_disk / FILE_NAME, [{"kind": "evaluate", "step": 8, "checkpoint": "step-8"}])  # `tiglon evaluate --output`
    Metrics(small_disk, tensorboard=False, wandb="", config={}, from_step=8, say=said.append).close()
    assert [record["step"] for record in read_records(small_disk / FILE_NAME)] == [*range(1, 9), 8]
    assert not list(Path(tempfile.gettempdir()).glob(f"tiglon-*-{FILE_NAME}")), "taken back"


def test_lines_of_zeros_are_set_aside_with_a_sentence(tmp_path: Path):
    path, said = tmp_path / FILE_NAME, []
    path.write_bytes(b'{"kind": "train", "step": 1}\n' + bytes(60) + b"\n" + b'{"kind": "train", "step": 2}\n')
    _lines_only(tmp_path, from_step=2, say=said.append).close()
    assert [record["step"] for record in read_records(path)] == [1, 2]
    assert (tmp_path / "metrics.jsonl.unreadable").read_bytes() == bytes(60) + b"\n"
    assert said == [f"metrics: 1 line that is no record was moved from {path} to metrics.jsonl.unreadable"]


def test_a_pen_of_somebody_elses_that_breaks_is_left(tmp_path: Path):
    said: list[str] = []
    metrics = _lines_only(tmp_path, say=said.append)

    class Broken:
        name, retries, afterwards = "broken", False, "without it"

        def record(self, record: dict) -> None:
            raise RuntimeError("no connection")

    metrics._pens.append(Broken())  # type: ignore[arg-type]
    for step in (1, 2):
        metrics.record({"kind": "train", "step": step})
    metrics.close()
    assert said == ["metrics: broken cannot be written (no connection); training is not affected, without it"]


class _FakeRun:
    def __init__(self):
        self.logged, self.finished = [], False

    def define_metric(self, name: str, step_metric: str):
        assert (name, step_metric) == ("*", "step")

    def log(self, values: dict):
        self.logged.append(values)

    def finish(self):
        self.finished = True


def test_weights_and_biases_sees_the_same_numbers_and_resumes_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    runs, calls = [], []

    def init(**arguments):
        calls.append(arguments)
        runs.append(_FakeRun())
        return runs[-1]

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, Html=lambda text: text))
    for _ in range(2):
        metrics = Metrics(tmp_path, tensorboard=False, wandb="cub", config={"a": 1})
        metrics.record({"kind": "train", "step": 3, "loss": 2.5})
        metrics.text("sample", "a < b", 3)
        metrics.close()
    assert runs[0].logged == [{"train/loss": 2.5, "step": 3}, {"sample": "<pre>a &lt; b</pre>", "step": 3}]
    assert runs[0].finished
    assert calls[0]["id"] == calls[1]["id"] and calls[0]["project"] == "cub" and calls[0]["resume"] == "allow"


def test_weights_and_biases_missing_is_one_sentence_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"log.wandb = 'cub' needs the wandb package.*pip install"):
        Metrics(tmp_path / "run", tensorboard=False, wandb="cub", config={})
    assert not (tmp_path / "run" / FILE_NAME).exists()


def test_records_are_plain_json_lines(tmp_path: Path):
    metrics = _lines_only(tmp_path)
    metrics.record({"kind": "train", "step": 1, "loss": 2.0})
    metrics.text("sample", "ünïcode\n", 1)
    metrics.close()
    lines = (tmp_path / FILE_NAME).read_text().splitlines()
    assert lines[0] == '{"kind": "train", "step": 1, "loss": 2.0}'
    assert json.loads(lines[1]) == {"kind": "text", "step": 1, "name": "sample", "text": "ünïcode\n"}
