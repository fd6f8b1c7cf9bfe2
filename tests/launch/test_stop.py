"""What a stop signal puts on the screen, at every stage of a run, and RUN/stopped."""

import io
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.exit_status import Status, was_stopped
from launch.run_end import RunEnd
from launch.runtime import ALONE
from launch.stop import clear_stop, record_stop, stop_signal
from tests.launch.test_run_end import session


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def screen_after(ending: RunEnd, screen: io.StringIO, grace_seconds: float, reports: bool, lines: int) -> str:
    """A SIGINT is sent to this process; what is on the screen once it has so many lines more."""
    before = len(screen.getvalue())
    with stop_signal(grace_seconds, ending, reports) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        until(lambda: stop.requested == "SIGINT" and screen.getvalue()[before:].count("\n") >= lines)
    return screen.getvalue()[before:]


def test_the_screen_says_what_a_signal_does_at_this_moment():
    screen = io.StringIO()
    ending = RunEnd(ALONE, screen)
    saves = "tiglon: SIGINT: the run saves and leaves; a second SIGINT leaves at once, without saving\n"
    assert screen_after(ending, screen, 100.0, True, 1) == saves
    ending.begin(session("kept", at=13, complete=12))
    assert "all steps are done and saved" in screen_after(ending, screen, 100.0, True, 1)
    ending.failing.set()
    assert "the run is about to end" in screen_after(ending, screen, 100.0, True, 1)
    assert screen_after(ending, screen, 100.0, False, 0) == "", "other ranks are silent"


@pytest.mark.parametrize(("complete", "lines"), [(0, 2), (7, 1)])
def test_an_unsaved_run_says_so_before_the_grace_period_is_over(complete: int, lines: int):
    screen = io.StringIO()
    ending = RunEnd(ALONE, screen)
    ending.begin(session("the newest is N", complete=complete))
    with stop_signal(0.2, ending, True):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.6)
    said = screen.getvalue().splitlines()
    late = "tiglon: 0.18 s after the stop signal the run is not saved yet (health.grace_seconds = 0.2); the newest is N"
    assert said[1:] == ([late] if lines == 2 else [])


@pytest.mark.parametrize(("complete", "status"), [(7, Status.INTERRUPTED), (12, Status.DONE)])
def test_a_second_ctrl_c_leaves_at_once(complete: int, status: Status, monkeypatch: pytest.MonkeyPatch):
    statuses: list[int] = []
    monkeypatch.setattr(os, "_exit", statuses.append)
    screen = io.StringIO()
    ending = RunEnd(ALONE, screen)
    ending.begin(session("the newest is N", at=12, complete=complete))
    with stop_signal(100.0, ending, True) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        until(lambda: stop.requested is not None)
        time.sleep(0.15)  # sooner it is the same one, handed on by a wrapper
        os.kill(os.getpid(), signal.SIGINT)
        until(lambda: bool(statuses))
    assert statuses == [status]
    assert screen.getvalue().splitlines()[-1] == "tiglon: left at once by a second SIGINT; the newest is N"


def test_an_orderly_stop_leaves_a_file_until_training_begins_again(tmp_path: Path):
    record_stop(tmp_path, "stopped by SIGTERM")
    assert was_stopped(tmp_path) and (tmp_path / "stopped").read_text().endswith(" stopped by SIGTERM\n")
    clear_stop(tmp_path)
    assert not was_stopped(tmp_path)
    record_stop(tmp_path / "nowhere", "stopped by SIGTERM")  # a full disk is no failure
