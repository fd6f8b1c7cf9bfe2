"""How a run stands, told from what it left."""

import os
import time
from pathlib import Path

import pytest

from launch.run_end import record_failure
from launch.run_status import run_status
from launch.stop import record_stop
from trainer.monitoring.watchdog import Heartbeat, Watchdog


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose records end now."""
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "logs").mkdir()
    return tmp_path


def _watched(run: Path) -> Watchdog:
    return Watchdog(1800.0, Heartbeat(), run / "logs" / "rank-0.log", print)


def _age(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def test_a_run_with_all_steps_is_done(run: Path):
    assert run_status(run, 2000, 2000) == "step 2,000 of 2,000: done"
    assert run_status(run, 12, 10) == "step 12 of 10: done"


def test_a_stopped_run_says_by_what(run: Path):
    record_stop(run, "stopped by SIGTERM at step 398; saved in runs/a; the same command resumes")
    wanted = "step 395 of 2,000: stopped by SIGTERM at step 398; saved in runs/a; the same command resumes"
    assert run_status(run, 395, 2000) == wanted
    record_failure(run, "rank 0: a start that was refused")
    assert run_status(run, 395, 2000) == wanted


def test_a_failed_run_says_why(run: Path):
    record_failure(run, "rank 1: step 21: the loss is nan")
    with _watched(run):  # a rank that has not left yet
        assert run_status(run, 20, 40) == "step 20 of 40: ended by an error: rank 1: step 21: the loss is nan"
    assert run_status(run, 40, 40).endswith("the loss is nan"), "its last step was never saved"
    checkpoint = run / "checkpoints" / "step-00000040"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    assert run_status(run, 40, 40) == "step 40 of 40: done", "the failure is that of a later start, which was refused"


def test_a_run_is_running_while_its_first_rank_has_a_heartbeat(run: Path):
    with _watched(run):
        assert run_status(run, 3, 40) == "step 3 of 40: running, last heartbeat 0s ago"
        assert run_status(run, 40, 40).startswith("step 40 of 40: running"), "it saves or evaluates"
    assert run_status(run, 3, 40) == "step 3 of 40: not done, last record 0s ago", "it left in order"


def test_a_killed_run_is_silent(run: Path):
    with _watched(run):
        _age(run / "logs" / "rank-0.alive", 180.0)
        for step in (3, 40):
            assert run_status(run, step, 40) == f"step {step} of 40: killed, last heartbeat 3m00s ago; the same command resumes"


def test_a_run_without_a_watchdog_or_a_configuration(run: Path):
    """health.hang_seconds = 0, a run inside another process, or RUN/superseded."""
    _age(run / "metrics.jsonl", 7200)
    assert run_status(run, 3, None) == "step 3: not done, last record 2h00m ago"
