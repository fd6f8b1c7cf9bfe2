"""A run that hangs costs as much as one that works: after long silence, write every stack down and end the process."""

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


class Watchdog:
    """Ends this process when no step finishes for `seconds`.

    Every rank has its own. When one rank stops answering, the others wait for it in a collective, so all of them fall
    silent together and each writes its own stacks. Beside its log each rank touches a file as a sign of life, so that
    those who end can name the one that cannot speak any more.

    Args:
        seconds: patience with one step; 0 = off.
        log_path: the stacks of all Python threads are appended here; the ranks' logs share one folder.
        report: told the sentence before the end (rank logs, the screen).
    """

    def __init__(self, seconds: float, log_path: Path, report: Callable[[str], None]) -> None:
        self._seconds = seconds
        self._pause = min(seconds / 20, 30.0)
        self._log_path = log_path
        self._alive = log_path.with_suffix(".alive")
        self._report = report
        self._last = (0, time.monotonic())  # step and time of the last beat; one tuple, so both change at once
        self._suspended = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, step: int) -> None:
        """Something was finished: a step, a batch of an evaluation, a checkpoint."""
        self._last = (step, time.monotonic())

    def __enter__(self) -> Self:
        if self._seconds > 0:
            self._log_path.parent.mkdir(parents=True, exist_ok=True)
            self._log = open(self._log_path, "a")  # now: a lost mount must not hide a hang
            self._touch()
            self._born = self._alive.stat().st_mtime
            self.beat(0)
            self._thread.start()
            if signal.getsignal(signal.SIGTSTP) == signal.SIG_DFL:
                signal.signal(signal.SIGTSTP, self._suspend)
        return self

    def _suspend(self, number: int, frame: Any) -> None:
        """Ctrl-Z: the time until the process is let go on is no hang. (SIGSTOP, which nobody can hear, looks like one.)"""
        self._suspended = True
        faulthandler.cancel_dump_traceback_later()
        os.kill(os.getpid(), signal.SIGSTOP)
        self.beat(self._last[0])
        self._suspended = False

    def __exit__(self, *_: Any) -> None:
        if self._seconds > 0:
            if signal.getsignal(signal.SIGTSTP) == self._suspend:
                signal.signal(signal.SIGTSTP, signal.SIG_DFL)
            self._over.set()
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()
            self._log.close()
            self._alive.unlink(missing_ok=True)

    def _watch(self) -> None:
        while not self._over.wait(self._pause):
            # If C code keeps the interpreter lock, this thread never wakes to renew the timer, and the timer itself
            # (a thread without Python) writes the stacks and ends the process.
            if self._suspended:
                continue
            faulthandler.dump_traceback_later(1.5 * self._seconds, exit=True, file=self._log)
            last = self._last
            step, since = last
            silent = time.monotonic() - since
            self._touch()
            if silent > self._seconds and last is self._last and not self._suspended:
                self._end(step, silent)

    def _touch(self) -> None:
        with contextlib.suppress(OSError):  # a full disk is not a hang
            self._alive.touch()

    def _end(self, step: int, silent: float) -> None:
        seen = f"no progress for {silent:.0f} seconds after step {step} (health.hang_seconds = {self._seconds:g}){self._mute()}"
        self._report(f"{seen}; stacks are in {self._log_path}; ending with status {EXIT_STATUS} so that the run can restart")
        with contextlib.suppress(OSError):  # a full disk
            print(f"watchdog: {seen}", file=self._log, flush=True)
            faulthandler.dump_traceback(file=self._log, all_threads=True)
        os._exit(EXIT_STATUS)

    def _mute(self) -> str:
        """Which ranks of this run's life show no sign of life (by the clock of the file system, which they share)."""
        signs = {}
        for path in self._alive.parent.glob("rank-*.alive"):
            with contextlib.suppress(FileNotFoundError):  # its rank has just left
                signs[path.stem] = path.stat().st_mtime
        now = signs.get(self._alive.stem, time.time())
        mute = sorted(name for name, seen in signs.items() if self._born - self._seconds < seen < now - 3 * self._pause)
        return f"; {', '.join(mute)} {'shows' if len(mute) == 1 else 'show'} no sign of life" if mute else ""
