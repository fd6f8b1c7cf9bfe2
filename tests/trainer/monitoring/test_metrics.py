"""All sinks together: resumes, ranks that write nothing, and sinks that fail."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.storage import replace_file
from tests.trainer.sinks import lines_only
from trainer.monitoring.config import LogConfig
from trainer.monitoring.metrics import Metrics
from trainer.monitoring.records import FILE_NAME, read_records


@settings(deadline=None)  # it writes files, and computers are busy
@given(written=st.integers(0, 12), resumed=st.integers(0, 12), torn=st.booleans())
def test_an_interrupted_and_resumed_run_equals_the_unbroken_one(
    tmp_path_factory: pytest.TempPathFactory, written: int, resumed: int, torn: bool
):
    directory = tmp_path_factory.mktemp("run")
    whole = [{"kind": "train", "step": step, "loss": 1 / step} for step in range(1, 13)]
    resumed = min(resumed, written)
    metrics = lines_only(directory)
    for record in whole[:written]:
        metrics.record(record)
    metrics.close()
    if torn:
        with open(directory / FILE_NAME, "a") as file:
            file.write('{"kind": "train", "st')
    metrics = lines_only(directory, from_step=resumed)
    for record in whole[resumed:]:
        metrics.record(record)
    metrics.close()
    assert read_records(directory / FILE_NAME) == whole
    assert [path.name for path in directory.iterdir()] == [FILE_NAME]


def test_ranks_without_a_directory_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    metrics = Metrics(replace_file, None, LogConfig(tensorboard=True, tracker="wandb", project="project"), config={})
    metrics.record({"kind": "train", "step": 1})
    metrics.text("sample", "text", 1)
    metrics.close()
    assert not list(tmp_path.iterdir())


def test_a_sink_that_fails_and_cannot_retry_is_dropped(tmp_path: Path):
    said: list[str] = []
    metrics = lines_only(tmp_path, say=said.append)

    class Broken:
        name, retries, afterwards = "broken", False, "without it"

        def record(self, record: dict) -> None:
            raise RuntimeError("no connection")

    metrics._sinks.append(Broken())  # type: ignore[arg-type]
    for step in (1, 2):
        metrics.record({"kind": "train", "step": step})
    metrics.close()
    assert said == ["metrics: broken cannot be written (no connection); training is not affected, without it"]
