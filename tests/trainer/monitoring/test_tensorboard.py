"""TensorBoard shows what metrics.jsonl holds, also after a resume, a rewind, a kill or a full disk."""

from contextlib import closing
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data.storage import replace_file
from tests.trainer.sinks import fill, large_record
from trainer.monitoring.config import LogConfig
from trainer.monitoring.jsonl import rescue_records
from trainer.monitoring.metrics import Metrics
from trainer.monitoring.records import FILE_NAME, read_records

_WRITER_THREAD = "ignore::pytest.PytestUnhandledThreadExceptionWarning"  # TensorBoard's writer fails in a thread of its own


def test_tensorboard_shows_scalars_health_and_the_sample(tmp_path: Path):
    metrics = Metrics(replace_file, tmp_path, LogConfig(), config={"train": {"steps": 2}})
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
        metrics = Metrics(replace_file, tmp_path, LogConfig(), config={}, from_step=from_step)
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
        metrics = Metrics(replace_file, tmp_path, LogConfig(), config={})
        for step in steps:
            metrics.record({"kind": "train", "step": step, "loss": float(step + len(steps))})
        metrics.close()
    assert _both(tmp_path) == ([(step, float(step + 6)) for step in range(1, 7)],) * 2


def test_after_a_rewind_both_show_the_new_steps_and_every_rewind(tmp_path: Path):
    metrics = Metrics(replace_file, tmp_path, LogConfig(), config={})
    for step in range(1, 7):
        metrics.record({"kind": "train", "step": step, "loss": float(step)})
    rewinds = [{"kind": "health", "step": step, "what": "spike", "action": "rewind"} for step in (6, 5)]
    for number, rewind in enumerate(rewinds, start=1):
        metrics.truncate(4)
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
    metrics = Metrics(replace_file, tmp_path, LogConfig(), config={})
    metrics.record({"kind": "train", "step": 4, "loss": 4.0})
    metrics.flush()
    with open(tmp_path / FILE_NAME, "a") as file:
        file.write('{"kind": "evaluate", "step": 4, "name": "validation", "context": 8, "loss": "NaN"}\n')
        file.write('{"kind": "text", "step": 4, "name": "sample", "text": "def"}\n')
    resumed = Metrics(replace_file, tmp_path, LogConfig(), config={}, from_step=4)
    assert [record["kind"] for record in resumed.last] == ["train", "evaluate", "text"]
    resumed.close()
    metrics.close()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("evaluate/validation/8/loss")] == [4]
    assert [event.step for event in board.Scalars("train/loss")] == [4]
    assert "sample/text_summary" in board.Tags()["tensors"]


@pytest.mark.filterwarnings(_WRITER_THREAD)
def test_tensorboard_makes_up_for_a_disk_that_was_full(small_disk: Path):
    said: list[str] = []
    metrics = Metrics(replace_file, small_disk, LogConfig(), config={}, say=said.append)
    for step in range(1, 31):
        if step == 11:
            filler = fill(small_disk)
        metrics.record(large_record(step, float(step)))
        if step % 5 == 0:
            metrics.flush()
        if step == 20:
            filler.unlink()
    metrics.close()
    wanted = [(step, float(step)) for step in range(1, 31)]
    assert _both(small_disk) == (wanted, wanted)
    assert [sum(f"{name} cannot be written" in text for text in said) for name in ("tensorboard", FILE_NAME)] == [1, 1]


@pytest.mark.filterwarnings(_WRITER_THREAD)
@pytest.mark.parametrize("from_step", [0, 6])
def test_tensorboard_is_made_up_for_by_the_run_that_resumes(small_disk: Path, from_step: int):
    """A disk that is full to the end, checkpoints elsewhere: the next run begins after what is missing."""
    with closing(Metrics(replace_file, small_disk, LogConfig(), config={})) as metrics:  # whole until later
        for step in range(1, 13):
            metrics.record(large_record(step, step + 100.0 * (step > from_step)))
    metrics = Metrics(replace_file, small_disk, LogConfig(), config={}, from_step=from_step, say=lambda sentence: None)
    filler = fill(small_disk)
    for step in range(from_step + 1, 11):
        metrics.record(large_record(step, float(step)))
    metrics.flush()
    assert "tensorboard lacks its last records" in metrics.flush_or_rescue()
    metrics.close()
    filler.unlink()
    rescue_records(small_disk / FILE_NAME, replace_file)
    with closing(Metrics(replace_file, small_disk, LogConfig(), config={}, from_step=10)) as metrics:
        metrics.record(large_record(11, 11.0))
    wanted = [(step, float(step)) for step in range(1, 12)]
    assert _both(small_disk) == (wanted, wanted)


@pytest.mark.filterwarnings(_WRITER_THREAD)
def test_a_rewind_on_a_full_disk_is_made_up_for(small_disk: Path):
    metrics = Metrics(replace_file, small_disk, LogConfig(), config={}, say=lambda sentence: None)
    for step in range(1, 9):
        if step == 7:
            filler = fill(small_disk)
        metrics.record(large_record(step, float(step)))
    metrics.flush()
    rewind = {"kind": "health", "step": 8, "what": "spike", "action": "rewind"}
    metrics.truncate(4)
    metrics.record(rewind)
    for step in range(5, 8):
        metrics.record(large_record(step, 10.0 + step))
    assert [record["step"] for record in read_records(small_disk / FILE_NAME)][:6] == [1, 2, 3, 4, 5, 6], "as it was"
    filler.unlink()
    assert metrics.flush_or_rescue() == ""
    metrics.close()
    wanted = [(step, step + 10.0 * (step > 4)) for step in range(1, 8)]
    assert _both(small_disk) == (wanted, wanted)
    assert [record for record in read_records(small_disk / FILE_NAME) if record["kind"] == "health"] == [rewind]
    assert not list(small_disk.glob("*.new"))
