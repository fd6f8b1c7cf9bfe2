"""How a run ends: one sentence on the screen that says why, and the first rank that failed."""

import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from typing import TextIO

from launch.program import USERS, interrupted, keep_traceback, launcher_tells, memory_asked, told
from launch.runtime import World
from launch.status import STOPPED_FILE, Status
from trainer.loop import RunEnded
from trainer.lost import lost_connection

SETTLE_SECONDS = 60.0
"""How long a rank that ends waits for the save in flight."""
FAILED_FILE = "failed"
"""RUN/logs/failed names the first rank that failed, for all ranks."""


class Ending:
    """What a rank says when its run ends before its last step. It grows as the run comes into being.

    Attributes:
        screen: where people look.
        directory: of the run; None until it is its own.
        where: what is going on, for example "step 12".
        kept: what there is to resume from, a sentence without its full stop.
        saved: whether the step that was made last is saved.
        finished: whether the last of all steps is.
        changes: whether the start has begun to change the run's directory.
        begun, told: set when this rank has begun to end by itself, and when it has said why.
        keep_log: moves what was printed so far into the rank's log and gives its path.
    """

    def __init__(self, here: World) -> None:
        self._here = here
        self.screen: TextIO = sys.stderr
        self.directory: Path | None = None
        self.where: Callable[[], str] = lambda: "while starting"
        self.kept: Callable[[], str] = lambda: ""
        self.keep_log: Callable[[], Path | None] = lambda: None
        self.saved: Callable[[], bool] = lambda: False
        self.finished: Callable[[], bool] = lambda: False
        self.changes = False
        self.begun, self.told = Event(), Event()
        self._settle: Callable[[float], None] = lambda seconds: None
        self._trains = False

    @property
    def name(self) -> str:
        """Who speaks."""
        return f"tiglon, rank {self._here.rank}" if self._here.world_size > 1 else "tiglon"

    def say(self, sentence: str) -> None:
        """Show a sentence of this rank."""
        self._show(f"{self.name}: {sentence}")

    def _show(self, line: str) -> None:
        """A screen that is gone ends nothing."""
        with suppress(OSError, ValueError):
            erase = "\r\x1b[2K" if self.screen.isatty() else ""  # the live line
            print(f"{erase}{line}", file=self.screen, flush=True)

    def mistake(self, error: Exception) -> Status:
        """Of the user's: every rank finds the same one, the first one on every computer says it (its disks may differ)."""
        if interrupted():
            return self.interrupted()
        if self._here.rank == 0:
            self._show(f"tiglon: {error}")
        elif self._here.local_rank == 0:
            self.say(str(error))
        return Status.MISTAKE

    def interrupted(self) -> Status:
        """By Ctrl-C before training began."""
        if self._here.rank == 0 and not launcher_tells():
            self._show("tiglon: interrupted before training began")
        return Status.INTERRUPTED

    def begin(
        self, where: Callable[[], str], kept: Callable[[], str], settle: Callable[[float], None],
        saved: Callable[[], bool], finished: Callable[[], bool],
    ) -> None:  # fmt: skip
        """Training begins: what is wrong from here on is no mistake of the user's.

        Args:
            settle: returns when no save is in flight, or after so many seconds.
        """
        self.where, self.kept, self._settle, self.saved, self.finished = where, kept, settle, saved, finished
        self._trains = True

    def failed(self, error: BaseException) -> Status:
        """The first rank that fails says why; what it does to the others stands in their logs."""
        self.begun.set()
        try:
            return self._tell(error)
        finally:
            self.told.set()

    def _tell(self, error: BaseException) -> Status:
        if interrupted() and not self._trains:
            return self.interrupted()
        if isinstance(error, USERS) and not self.changes:
            if not claim(self.directory, f"rank {self._here.rank}: {error}"):
                self.say(str(error))
            traceback.print_exception(error, file=sys.stderr)
            return Status.MISTAKE
        what = error if isinstance(error, RunEnded) else f"{self.where()}: {sentence(error, self.where())}"
        first = claim(self.directory, f"rank {self._here.rank}: {what}")
        with suppress(Exception):
            self._settle(SETTLE_SECONDS)  # a save in flight may be the newest checkpoint yet
        place = self._keep_traceback(error, first or f"{self.name}: {what}")
        if not first:
            kept = "" if self.kept() in str(error) else self.kept()
            self.say("; ".join(part for part in (str(what), kept, place) if part))
        elif self.should_tell(first):
            self.say(f"ends because another rank failed first: {first}")
        return Status.FAILED

    def _keep_traceback(self, error: BaseException, what: str) -> str:
        """Write it into the rank's log, or a file of its own before there is one; where it is."""
        with suppress(OSError, ValueError):  # the log's disk may be the one that is full
            if (log := self.keep_log()) is None:
                return keep_traceback(error)
            print(what, file=sys.stderr)
            traceback.print_exception(error, file=sys.stderr)
            sys.stderr.flush()
            return f"{'log:' if isinstance(error, RunEnded) else 'traceback in'} {log}"
        return ""

    def should_tell(self, first: str) -> bool:
        """Whether this rank tells people of the first failure: once on every computer that was not told by that rank."""
        found = re.match(r"rank (\d+)", first)
        return self._here.local_rank == 0 and not (found and self._here.shares_node_with(int(found[1])))


def claim(directory: Path | None, sentence: str) -> str:
    """Note that this rank failed, for the others; "" if it is the first, else what the first one said."""
    if directory is None:
        return ""
    path = directory / "logs" / FAILED_FILE
    try:
        with open(path, "x") as file:
            file.write(sentence)
        return ""
    except FileExistsError:
        return first_failure(directory)
    except OSError:
        return ""


def first_failure(directory: Path) -> str:
    """The first rank that failed and why, or nothing."""
    try:
        return (directory / "logs" / FAILED_FILE).read_text() or "another rank failed first"  # which had no room to say why
    except (OSError, UnicodeDecodeError):
        return ""


def forget_failure(directory: Path) -> None:
    """The ranks of an earlier start have the word no longer."""
    (directory / "logs" / FAILED_FILE).unlink(missing_ok=True)


def forget_stop(directory: Path) -> None:
    """Training begins again."""
    (directory / STOPPED_FILE).unlink(missing_ok=True)


class FailureWatch:
    """Ends this rank when another one failed: it may be waiting for it in a collective, for as long as that one's timeout.

    A thread looks for RUN/logs/failed, which all ranks share. The main thread gets a while to end by itself; a save in flight,
    in which the failed rank still takes part, is finished.

    Args:
        ending: what is said, and where.
        settle: returns when no save is in flight, or after so many seconds.
    """

    POLL_SECONDS = 2.0
    PATIENCE_SECONDS = 10.0

    def __init__(self, ending: Ending, here: World, settle: Callable[[float], None]) -> None:
        self._ending, self._here, self._settle = ending, here, settle
        self._over = Event()
        self._thread = Thread(target=self._watch, name="failures", daemon=True)

    def __enter__(self) -> "FailureWatch":
        if self._here.world_size > 1:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def _watch(self) -> None:
        directory = self._ending.directory
        assert directory is not None
        while not self._over.wait(self.POLL_SECONDS):
            if found := first_failure(directory):
                break
        else:
            return
        if not self._ending.begun.is_set():
            with suppress(OSError, ValueError):  # a full disk
                print(f"this rank ends: {found}", file=sys.stderr, flush=True)
            if self._ending.should_tell(found):
                self._ending.say(f"ends because another rank failed first: {found}")
        if self._over.wait(self.PATIENCE_SECONDS):
            return
        self._settle(SETTLE_SECONDS)
        if self._ending.begun.is_set() and not self._ending.told.is_set():
            self._ending.told.wait(SETTLE_SECONDS)
            self._over.wait(self.PATIENCE_SECONDS)
        os._exit(Status.FAILED)


def sentence(error: BaseException, where: str = "") -> str:
    """Type and message of an error in one line; of memory that could not be had, how much, and what needs less."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    if reason := lost_connection(error):
        return f"the connection to another rank was lost ({reason}); that rank or its node was killed, or left"
    if (asked := memory_asked(error)) is not None:
        return f"out of memory{asked}; {_SMALLER_STEP if where.startswith('step') else _SMALLER_MODEL}"
    if isinstance(error, OSError) and error.errno is not None:
        return told(error)
    return f"{type(error).__name__}: {lines[0]}".rstrip(": ")


_SMALLER_STEP = "use a smaller train.micro_batch_size or train.sequence_length, or train.recompute=full"
_SMALLER_MODEL = (
    "share the model among more ranks with parallel.zero_stage=3 or parallel.tensor_parallel_size, or make it smaller: "
    "model.hidden_size, model.intermediate_size, model.num_hidden_layers, model.vocab_size"
)


def record_stop(directory: Path, sentence: str) -> None:
    """Write RUN/stopped; where the disk is full the status alone has to tell."""
    with suppress(OSError):
        (directory / STOPPED_FILE).write_text(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {sentence}\n")
