"""Ends a process that makes no progress, after writing the stacks of all threads to its log."""

import contextlib
import faulthandler
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

EXIT_STATUS = 75
"""EX_TEMPFAIL of sysexits.h: try again. torchrun restarts the ranks, and they resume."""
LONGEST_PAUSE_SECONDS = 30.0
"""Between two touches of a heartbeat file."""


def _alive_file(log_path: Path) -> Path:
    return log_path.with_suffix(".alive")


def silent_seconds(log_path: Path) -> float | None:
    """How long ago the rank of this log touched its heartbeat file; None where it left in order or has no watchdog."""
    with contextlib.suppress(FileNotFoundError):
        return time.time() - _alive_file(log_path).stat().st_mtime
    return None


class Heartbeat:
    """The update that a rank is making, and when it last made progress.

    Attributes:
        update: number of the update in progress, from 1; before the first, that of the last one that was made.
        last: the update at the last progress, and its time (s, monotonic); one tuple, so both change at once.
    """

    def __init__(self) -> None:
        self.update = 0
        self.last = (0, time.monotonic())

    def begin(self, update: int) -> None:
        """From here on beats count for this update."""
        self.update = update

    def beat(self) -> None:
        """There is progress: a step, a batch of an evaluation or a part of a checkpoint is finished."""
        self.last = (self.update, time.monotonic())


class Watchdog:
    """Ends this process when no step finishes for `seconds`.

    Every rank has its own. When one rank hangs, the others wait for it in a collective, so none makes progress and each
    writes its own stacks. Each rank touches a heartbeat file beside its log, so that the others can name a rank that has
    stopped responding.

    Args:
        seconds: longest time without progress; 0 = off.
        heartbeat: what makes progress beats it.
        log_path: the stacks of all Python threads are appended here; the ranks' logs share one folder.
        report: called with one sentence before the end.
    """

    def __init__(self, seconds: float, heartbeat: Heartbeat, log_path: Path, report: Callable[[str], None]) -> None:
        self._seconds, self._heartbeat = seconds, heartbeat
        self._pause = min(seconds / 20, LONGEST_PAUSE_SECONDS)
        self._log_path = log_path
        self._alive_file = _alive_file(log_path)
        self._report = report
        self._suspended = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        if self._seconds > 0:
            self._log_path.parent.mkdir(parents=True, exist_ok=True)
            self._log = open(
                self._log_path, "a", encoding="utf-8", errors="backslashreplace"
            )  # now: a file system that is lost later must not hide a hang
            self._touch()
            self._started = self._alive_file.stat().st_mtime
            self._heartbeat.beat()
            self._thread.start()
            if signal.getsignal(signal.SIGTSTP) == signal.SIG_DFL:
                signal.signal(signal.SIGTSTP, self._suspend)
        return self

    def _suspend(self, number: int, frame: Any) -> None:
        """Ctrl-Z: the time until the process is continued is no hang. (SIGSTOP has no handler, so it counts as one.)"""
        self._suspended = True
        faulthandler.cancel_dump_traceback_later()
        os.kill(os.getpid(), signal.SIGSTOP)
        self._heartbeat.beat()
        self._suspended = False

    def __exit__(self, *_: Any) -> None:
        if self._seconds > 0:
            if signal.getsignal(signal.SIGTSTP) == self._suspend:
                signal.signal(signal.SIGTSTP, signal.SIG_DFL)
            self._over.set()
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()
            self._log.close()
            self._alive_file.unlink(missing_ok=True)

    def _watch(self) -> None:
        while not self._over.wait(self._pause):
            # If C code holds the interpreter lock, this thread cannot renew the timer, and the timer itself (a thread without
            # Python) writes the stacks and ends the process.
            if self._suspended:
                continue
            faulthandler.dump_traceback_later(1.5 * self._seconds, exit=True, file=self._log)
            last = self._heartbeat.last
            step, since = last
            idle = time.monotonic() - since
            self._touch()
            if idle > self._seconds and last is self._heartbeat.last and not self._suspended:
                self._end(step, idle)

    def _touch(self) -> None:
        with contextlib.suppress(OSError):  # a full disk is not a hang
            self._alive_file.touch()

    def _end(self, step: int, idle: float) -> None:
        limit = f"health.hang_seconds = {self._seconds:g}"
        hang = f"no progress for {idle:.0f} seconds after step {step} ({limit}){self._not_responding()}"
        self._report(f"{hang}; stacks are in {self._log_path}; ending with status {EXIT_STATUS} so that the run can restart")
        with contextlib.suppress(OSError):  # a full disk
            print(f"watchdog: {hang}", file=self._log, flush=True)
            faulthandler.dump_traceback(file=self._log, all_threads=True)
        os._exit(EXIT_STATUS)

    def _not_responding(self) -> str:
        """The ranks of this run whose heartbeat is too old (by the clock of the file system, which they share)."""
        times = {}
        for path in self._alive_file.parent.glob("rank-*.alive"):
            with contextlib.suppress(FileNotFoundError):  # its rank has just ended
                times[path.stem] = path.stat().st_mtime
        now, limit = times.get(self._alive_file.stem, time.time()), 3 * self._pause
        silent = sorted(name for name, beat in times.items() if self._started - self._seconds < beat < now - limit)
        return (
            f"; {', '.join(silent)} {'has' if len(silent) == 1 else 'have'} not responded for {limit:.3g} s" if silent else ""
        )
