"""Weights & Biases gets the same numbers, under one id. The real package is slow: `pytest -m slow` runs it offline."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from data.storage import replace_file
from trainer.monitoring.config import LogConfig
from trainer.monitoring.metrics import Metrics
from trainer.monitoring.records import FILE_NAME

ROOT = Path(__file__).parents[3]


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
        metrics = Metrics(replace_file, tmp_path, LogConfig(tensorboard=False, tracker="wandb", project="cub"), config={"a": 1})
        metrics.record({"kind": "train", "step": 3, "loss": 2.5})
        metrics.text("sample", "a < b", 3)
        metrics.close()
    assert runs[0].logged == [{"train/loss": 2.5, "step": 3}, {"sample": "<pre>a &lt; b</pre>", "step": 3}]
    assert runs[0].finished
    assert calls[0]["id"] == calls[1]["id"] and calls[0]["project"] == "cub" and calls[0]["resume"] == "allow"


def test_weights_and_biases_missing_is_one_sentence_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"log.tracker = 'wandb' needs the wandb package.*pip install"):
        Metrics(replace_file, tmp_path / "run", LogConfig(tensorboard=False, tracker="wandb", project="cub"), config={})
    assert not (tmp_path / "run" / FILE_NAME).exists()


@pytest.mark.slow
def test_the_real_package_keeps_the_same_numbers_offline(tmp_path: Path):
    """In a process of its own, as the package keeps threads and a service; read back from the files it would send."""
    pytest.importorskip("wandb")
    script = """
import sys
from pathlib import Path
from data.storage import replace_file
from trainer.monitoring.config import LogConfig
from trainer.monitoring.metrics import Metrics
for step in (3, 4):
    log = LogConfig(tensorboard=False, tracker="wandb", project="cub")
    metrics = Metrics(replace_file, Path(sys.argv[1]), log, {"train": {"steps": 9}}, step - 1, sys.exit)
    metrics.record({"kind": "train", "step": step, "loss": 0.1 + step, "skipped": False})
    metrics.text("sample", "a < b", step)
    metrics.close()
"""
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": str(tmp_path / "elsewhere")}
    subprocess.run([sys.executable, "-c", script, tmp_path], env=environment, check=True, timeout=120, cwd=ROOT)
    identity = (tmp_path / "wandb-run.txt").read_text().strip()
    starts = [records(path) for path in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))]
    assert len(starts) == 2
    for step, found in zip((3, 4), starts, strict=True):
        (run,) = [record.run for record in found if record.WhichOneof("record_type") == "run"]
        assert (run.run_id, run.project) == (identity, "cub")
        assert {item.key: item.value_json for item in run.config.update}["train"] == '{"steps":9}'
        rows = [record.history.item for record in found if record.WhichOneof("record_type") == "history"]
        values = {
            "/".join([item.key, *item.nested_key]).strip("/"): json.loads(item.value_json) for row in rows for item in row
        }
        assert (values["step"], values["train/loss"], values["train/skipped"]) == (step, 0.1 + step, 0.0)
        assert values["sample/_type"] == "html-file"
    assert [path.read_text().count("a &lt; b") for path in tmp_path.glob("wandb/offline-run-*/files/media/html/*")] == [1, 1]


def records(path: Path) -> list:
    """Records of a .wandb file: LevelDB's log format behind seven bytes, blocks of 32 KiB, each piece behind a checksum, its
    length and whether the record is whole."""
    from wandb.proto import wandb_internal_pb2

    content, at, found, piece = path.read_bytes(), 7, [], b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # padding of a block
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        piece += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last piece
            found.append(wandb_internal_pb2.Record.FromString(piece))
            piece = b""
    return found
