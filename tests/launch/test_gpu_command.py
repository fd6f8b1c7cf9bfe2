"""`python -m benchmarks.gpu`: what it measures is kept whatever happens to it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.gpu import page
from benchmarks.gpu.__main__ import PLAN

ROOT = Path(__file__).parent.parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def started(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--tiny", "--output", str(folder), *arguments]
    return subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def figures(folder: Path) -> list[dict[str, Any]]:
    path = folder / "gpu.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_part_that_is_killed_leaves_its_figures_and_the_others_theirs(tmp_path: Path):
    command = started(tmp_path, "--only", "machine", "ceilings", "--seconds", "100")
    deadline = time.monotonic() + 90
    while not any(record["what"] == "copy" for record in figures(tmp_path)):
        assert time.monotonic() < deadline and command.poll() is None
        time.sleep(0.02)
    parts = [one for one in psutil.Process(command.pid).children() if "ceilings" in one.cmdline()]
    parts[0].send_signal(signal.SIGKILL)
    screen, _ = command.communicate(timeout=60)
    assert command.returncode == 1 and "ceilings: killed by signal 9" in screen
    found = {record["what"]: record for record in figures(tmp_path) if record["part"] == "ceilings"}
    assert found["copy"]["tb_per_second"] > 0 and found["end"]["error"] == "killed by signal 9"
    text = (tmp_path / "gpu.md").read_text()
    assert "tb per second" in text and "killed by signal 9" in text and "CPU cores" in text
    assert "--only machine ceilings" in text


def test_the_whole_is_over_in_time_and_takes_its_processes_along(tmp_path: Path):
    command = started(tmp_path, "--only", "ceilings", "smoke", "--seconds", "42")
    deadline = time.monotonic() + 40
    while not (found := psutil.Process(command.pid).children(recursive=True)) and time.monotonic() < deadline:
        time.sleep(0.05)
    command.send_signal(signal.SIGTERM)
    command.communicate(timeout=30)
    assert command.returncode == 143
    assert not [one for one in found if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    assert [record["error"] for record in figures(tmp_path) if record["what"] == "end"] == ["interrupted"]


def test_what_does_not_fit_is_not_begun_and_said(tmp_path: Path):
    command = started(tmp_path, "--only", "step-8b", "--seconds", "10")
    screen, _ = command.communicate(timeout=60)
    assert command.returncode == 1 and "step-8b: not begun, 10 s left" in screen


def test_without_a_gpu_one_sentence_says_so(tmp_path: Path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--output", str(tmp_path)]
    done = subprocess.run(command, env=ENVIRONMENT | {"CUDA_VISIBLE_DEVICES": ""}, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "torch finds no GPU here" in done.stderr


def test_a_ratio_is_taken_within_one_call():
    step = {"part": "step-8b", "what": "step", "shape": "8b", "length": 4096, "micro_batches": 1, "at": 0.0}
    peer = {"part": "peers-8b", "what": "peer", "name": "other", "shape": "8b", "length": 4096, "at": 0.0}
    records = [
        {"run": "a", **step, "tokens_per_second": 300.0}, {"run": "b", **step, "tokens_per_second": 200.0},
        {"run": "b", **peer, "tokens_per_second": 100.0},
    ]  # fmt: skip
    assert "| 2.00 |" in "\n".join(page.lines(records))
    assert "| not in this call |" in "\n".join(page.lines([records[0], records[2]]))


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_every_part_runs_on_a_cpu(tmp_path: Path):
    command = started(tmp_path, "--seconds", "600")
    screen, words = command.communicate(timeout=650)
    assert command.returncode == 0, screen + words
    measured = {record["part"] for record in figures(tmp_path) if record["what"] not in ("begin", "end")}
    assert measured == {plan.name for plan in PLAN}
