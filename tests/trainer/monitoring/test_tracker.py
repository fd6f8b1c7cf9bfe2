"""The identity of a tracker's run, and what a tracker that fails does to training."""

from pathlib import Path
from typing import Any

import pytest

from data.storage import replace_file
from trainer.monitoring import config
from trainer.monitoring.config import LogConfig
from trainer.monitoring.metrics import Metrics
from trainer.monitoring.records import FILE_NAME, read_records
from trainer.monitoring.tracker import Tracker


class Plain(Tracker):
    """Of files: what a package would have sent is written beside the records."""

    package, title, run_file = "json", "Plain", "plain-run.txt"

    def __init__(self, directory: Path, project: str, config: dict[str, Any]) -> None:
        self.name = f"plain project {project}"
        self._sent = directory / f"{project}-{self.identity(directory, lambda: 'first')}"

    def record(self, record: dict[str, Any]) -> None:
        if record["step"] == 3:
            raise ConnectionError("no route to host")
        self._sent.open("a").write(f"{record['step']}\n")

    def text(self, name: str, text: str, step: int) -> None: ...

    def close(self) -> None: ...


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> LogConfig:
    monkeypatch.setitem(config.TRACKERS, "plain", Plain)
    return LogConfig(tensorboard=False).model_copy(update={"tracker": "plain", "project": "cub"})


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_tracker_keeps_its_run_and_takes_nothing_back(plain: LogConfig, tmp_path: Path):
    for from_step, steps in ((0, (1, 2)), (1, (2,))):
        metrics = Metrics(replace_file, tmp_path, plain, config={}, from_step=from_step)
        for step in steps:
            metrics.record({"kind": "train", "step": step})
        metrics.truncate(1)
        metrics.flush()
        metrics.close()
    assert (tmp_path / Plain.run_file).read_text() == "first\n"
    assert (tmp_path / "cub-first").read_text() == "1\n2\n2\n"


def test_one_that_fails_is_dropped_and_training_continues(plain: LogConfig, tmp_path: Path):
    said: list[str] = []
    metrics = Metrics(replace_file, tmp_path, plain, config={}, say=said.append)
    for step in (3, 4):
        metrics.record({"kind": "train", "step": step})
    metrics.close()
    assert said == [
        "metrics: plain project cub cannot be written (no route to host); training is not affected, "
        "Plain gets nothing more from this process"
    ]
    assert not (tmp_path / "cub-first").exists() and len(read_records(tmp_path / FILE_NAME)) == 2


def test_a_package_that_is_missing_is_one_sentence():
    class Missing(Plain):
        package = "no_such_tracker"

    assert Plain.find_package().__name__ == "json"
    with pytest.raises(ValueError, match=r"log.tracker = 'no_such_tracker' needs the no_such_tracker package.*pip install"):
        Missing.find_package()
