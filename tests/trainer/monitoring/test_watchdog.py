"""A hang is noticed, written down and ended, also when C code keeps the interpreter lock; a run that works is left alone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trainer.monitoring.watchdog import EXIT_STATUS, Heartbeat, Watchdog

HANG = """
import ctypes, sys, time
from pathlib import Path
from trainer.monitoring.watchdog import Heartbeat, Watchdog

def the_step_that_hangs():
    {hang}

heartbeat = Heartbeat()
heartbeat.begin(7)
with Watchdog({seconds}, heartbeat, Path(sys.argv[1]), lambda sentence: print(sentence, file=sys.stderr, flush=True)):
    heartbeat.beat()
    heartbeat.begin(8)
    the_step_that_hangs()
print("never here")
"""


def _hang(tmp_path: Path, hang: str, seconds: float) -> tuple[subprocess.CompletedProcess, str]:
    log = tmp_path / "logs" / "rank-0.log"
    code = HANG.format(hang=hang, seconds=seconds)
    ended = subprocess.run([sys.executable, "-c", code, str(log)], capture_output=True, text=True, timeout=60)
    assert "never here" not in ended.stdout
    return ended, log.read_text()


def test_a_hang_ends_with_a_sentence_and_all_stacks(tmp_path: Path):
    began = time.monotonic()
    ended, log = _hang(tmp_path, "time.sleep(50)", 0.4)
    assert ended.returncode == EXIT_STATUS
    assert time.monotonic() - began < 20
    assert "no progress for" in ended.stderr and "after step 7" in ended.stderr and "rank-0.log" in ended.stderr
    assert "the_step_that_hangs" in log and "after step 7" in log


def test_a_hang_that_keeps_the_interpreter_lock_is_ended_too(tmp_path: Path):
    ended, log = _hang(tmp_path, "time.sleep(0.3); ctypes.PyDLL(None).sleep(50)", 0.6)
    assert ended.returncode != 0
    assert "the_step_that_hangs" in log


def test_a_rank_that_was_stopped_is_named_by_another(tmp_path: Path):
    log = tmp_path / "logs" / "rank-1.log"
    stopped = subprocess.Popen([sys.executable, "-c", HANG.format(hang="time.sleep(50)", seconds=40), str(log)])
    alive = log.with_suffix(".alive")
    try:
        while not alive.exists():
            time.sleep(0.02)
        stopped.send_signal(signal.SIGSTOP)
        (tmp_path / "logs" / "rank-7.alive").touch()
        os.utime(tmp_path / "logs" / "rank-7.alive", (0, 0))  # of an earlier life with more ranks
        ended, _ = _hang(tmp_path, "time.sleep(50)", 1.0)
    finally:
        stopped.kill()
        stopped.wait()
    assert "; rank-1 has not responded for 0." in ended.stderr


def test_a_run_that_works_is_left_alone(tmp_path: Path):
    said, heartbeat = list[str](), Heartbeat()
    with Watchdog(0.5, heartbeat, tmp_path / "rank-0.log", said.append):
        for _ in range(8):
            time.sleep(0.1)
            heartbeat.beat()
    assert not said and (tmp_path / "rank-0.log").read_text() == ""
    assert not (tmp_path / "rank-0.alive").exists()


def test_an_error_inside_passes_through(tmp_path: Path):
    with pytest.raises(KeyError), Watchdog(5, Heartbeat(), tmp_path / "rank-0.log", print):
        raise KeyError


def test_zero_is_off(tmp_path: Path):
    with Watchdog(0, Heartbeat(), tmp_path / "rank-0.log", print):
        time.sleep(0.05)
    assert not (tmp_path / "rank-0.log").exists()
