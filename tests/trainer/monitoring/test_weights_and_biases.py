"""Weights & Biases gets the same numbers, under one id."""

import sys
import types
from pathlib import Path

import pytest

from data.storage import replace_file
from trainer.monitoring.metrics import Metrics
from trainer.monitoring.records import FILE_NAME


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
        metrics = Metrics(replace_file, tmp_path, tensorboard=False, wandb="cub", config={"a": 1})
        metrics.record({"kind": "train", "step": 3, "loss": 2.5})
        metrics.text("sample", "a < b", 3)
        metrics.close()
    assert runs[0].logged == [{"train/loss": 2.5, "step": 3}, {"sample": "<pre>a &lt; b</pre>", "step": 3}]
    assert runs[0].finished
    assert calls[0]["id"] == calls[1]["id"] and calls[0]["project"] == "cub" and calls[0]["resume"] == "allow"


def test_weights_and_biases_missing_is_one_sentence_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"log.wandb = 'cub' needs the wandb package.*pip install"):
        Metrics(replace_file, tmp_path / "run", tensorboard=False, wandb="cub", config={})
    assert not (tmp_path / "run" / FILE_NAME).exists()
