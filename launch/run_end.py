"""How a run ends: one sentence on the screen that says why, and the first rank that failed."""

import os
import re
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from enum import IntEnum
from pathlib import Path
from threading import Event, Thread
from typing import Self, TextIO

from launch.exit_status import Status
from launch.interrupts import interrupted, launcher_reports_interrupts
from launch.program import USERS, keep_traceback, memory_asked, system_error_sentence
from launch.runtime import World
from trainer.lost_rank import lost_rank_message
from trainer.session import RunEnded, Session

BEFORE_TRAINING = "interrupted before training began"
SETTLE_SECONDS = 60.0
"""How long a rank that fails waits for the save in flight."""
FAILED_FILE = "failed"
"""RUN/logs/failed names the first rank that failed, for all ranks."""


class Stage(IntEnum):
    """How far the start of a run is: what may be written when it ends here."""

    CHECKING = 0
    LOCKED = 1
    """The run directory's lock is held: its logs may be written."""
    HELD = 2
    """So do all ranks: RUN/logs/failed is this start's."""
    CHANGED = 3
    """The run directory is changed: what is wrong from here on is no mistake of the user's."""


class RunEnd:
    """What one rank says when its run ends before its last step.

    Args:
        screen: where people look; default: stderr.
        directory: of the run, once its configuration is read.
        keep_log: moves what was printed so far into the rank's log and gives its path.

    Attributes:
        failing: set when this rank has begun to end by itself.
        reported: set when it has said why.
        ends_process: whether the process is this run's alone, so that a hang may end it.
    """

    ends_process = True

    def __init__(
        self, world: World, screen: TextIO | None = None, directory: Path | None = None,
        keep_log: Callable[[], Path | None] = lambda: None,
    ) -> None:  # fmt: skip
        self._world, self._screen, self._directory, self._keep_log = world, screen or sys.stderr, directory, keep_log
        self.failing, self.reported = Event(), Event()
        self._stage = Stage.CHECKING
        self._session: Session | None = None

    def complete(self, step: int, path: str) -> None:
        """The run has trained to its last step or was stopped, and is saved: the checkpoint `path` holds this step."""

    def explain(self, sentence: str) -> None:
        """Say why this rank has failed."""
        self.say(sentence)

    def leave(self, status: int) -> None:
        """End at once, from another thread than the one that trains."""
        os._exit(status)

    def reach(self, stage: Stage) -> None:
        """The start has come this far."""
        self._stage = stage

    def begin(self, session: Session) -> None:
        """Training begins."""
        self._session = session

    @property
    def directory(self) -> Path | None:
        """Of the run; None until all ranks hold it."""
        return self._directory if self._stage >= Stage.HELD else None

    @property
    def _where(self) -> str:
        return "while starting" if self._session is None else f"step {self._session.heartbeat.update}"

    def kept(self) -> str:
        """What there is to resume from, a sentence without its full stop; "" before training begins."""
        return "" if self._session is None else self._session.checkpoints.describe_newest()

    def saved(self) -> bool:
        """Whether the update that is being made is complete and saved."""
        return self._session is not None and self._session.checkpoints.is_complete(self._session.heartbeat.update)

    def finished(self) -> bool:
        """Whether the last of all steps is saved."""
        return self._session is not None and self._session.checkpoints.is_complete(self._session.settings.train.steps)

    @property
    def name(self) -> str:
        """Who speaks."""
        return f"tiglon, rank {self._world.rank}" if self._world.world_size > 1 else "tiglon"

    def say(self, sentence: str) -> None:
        """Show a sentence of this rank."""
        self._show(f"{self.name}: {sentence}")

    def _show(self, line: str) -> None:
        """A screen that is gone ends nothing."""
        with suppress(OSError, ValueError):
            erase = "\r\x1b[2K" if self._screen.isatty() else ""  # the live line
            print(f"{erase}{line}", file=self._screen, flush=True)

    def mistake(self, error: Exception) -> Status:
        """Of the user's: every rank finds the same one, the first one on every computer says it (its disks may differ)."""
        if interrupted():
            return self.interrupted()
        if self._world.rank == 0:
            self._show(f"tiglon: {error}")
        elif self._world.local_rank == 0:
            self.say(str(error))
        return Status.MISTAKE

    def interrupted(self) -> Status:
        """By Ctrl-C before training began."""
        if self._world.rank == 0 and not launcher_reports_interrupts():
            self._show(f"tiglon: {BEFORE_TRAINING}")
        return Status.INTERRUPTED

    def failed(self, error: BaseException) -> Status:
        """The first rank that fails says why; errors that this causes on other ranks stand in their logs only."""
        self.failing.set()
        try:
            return self._report(error)
        finally:
            self.reported.set()

    def _report(self, error: BaseException) -> Status:
        if interrupted() and self._session is None:
            return self.interrupted()
        if isinstance(error, USERS) and self._stage < Stage.CHANGED:
            if not record_failure(self.directory, f"rank {self._world.rank}: {error}"):
                self.explain(str(error))
            traceback.print_exception(error, file=sys.stderr)
            return Status.MISTAKE
        what = error if isinstance(error, RunEnded) else f"{self._where}: {end_sentence(error, self._where)}"
        first = record_failure(self.directory, f"rank {self._world.rank}: {what}")
        with suppress(Exception):
            self._wait_for_save()
        traceback_place = self._keep_traceback(error, first or f"{self.name}: {what}")
        if not first:
            kept = "" if self.kept() in str(error) else self.kept()
            self.explain("; ".join(part for part in (str(what), kept, traceback_place) if part))
        elif self.reports_failure_of(first):
            self.explain(f"ends because another rank failed first: {first}")
        return Status.FAILED

    def _wait_for_save(self) -> None:
        """A save in flight may be the newest checkpoint yet."""
        if self._session is not None:
            self._session.checkpoints.drain(SETTLE_SECONDS)

    def _keep_traceback(self, error: BaseException, what: str) -> str:
        """Write it into the rank's log, or a file of its own before there is one; where it is."""
        with suppress(OSError, ValueError):  # the log's disk may be the one that is full
            if self._stage < Stage.LOCKED or (log := self._keep_log()) is None:
                return keep_traceback(error)
            print(what, file=sys.stderr)
            traceback.print_exception(error, file=sys.stderr)
            sys.stderr.flush()
            return f"{'log:' if isinstance(error, RunEnded) else 'traceback in'} {log}"
        return ""

    def reports_failure_of(self, first: str) -> bool:
        """Whether this rank tells people of the first failure: once on every computer where that rank does not run."""
        failed = re.match(r"rank (\d+)", first)
        return self._world.local_rank == 0 and not (failed and self._world.shares_node_with(int(failed[1])))


def record_failure(directory: Path | None, sentence: str) -> str:
    """Write RUN/logs/failed for the other ranks; "" if this rank is the first to do so, else what the first one wrote."""
    if directory is None:
        return ""
    path = directory / "logs" / FAILED_FILE
    try:
        with open(path, "x", encoding="utf-8", errors="backslashreplace") as file:
            file.write(sentence)
        return ""
    except FileExistsError:
        return first_failure(directory)
    except OSError:
        return ""


def first_failure(directory: Path) -> str:
    """The first rank that failed and why; "" if none has."""
    try:
        return (directory / "logs" / FAILED_FILE).read_text(
            encoding="utf-8"
        ) or "another rank failed first"  # its disk was full
    except (OSError, UnicodeDecodeError):
        return ""


def clear_failure(directory: Path) -> None:
    """Remove RUN/logs/failed of an earlier start."""
    (directory / "logs" / FAILED_FILE).unlink(missing_ok=True)


class FailureWatch:
    """Ends this rank when another one failed: it may be waiting for it in a collective, for as long as that one's timeout.

    A thread polls RUN/logs/failed, which all ranks share. The main thread gets PATIENCE_SECONDS to end by itself; a save in
    flight, in which the failed rank still takes part, is finished.

    Args:
        ending: what is said, and where.
        settle: returns when no save is in flight, or after so many seconds.
    """

    POLL_SECONDS = 2.0
    PATIENCE_SECONDS = 10.0

    def __init__(self, ending: RunEnd, world: World, settle: Callable[[float], None]) -> None:
        self._ending, self._world, self._settle = ending, world, settle
        self._over = Event()
        self._thread = Thread(target=self._watch, name="failures", daemon=True)

    def __enter__(self) -> Self:
        if self._world.world_size > 1:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def _watch(self) -> None:
        ending = self._ending
        assert ending.directory is not None
        while not (failure := first_failure(ending.directory)):
            if self._over.wait(self.POLL_SECONDS):
                return
        if not ending.failing.is_set():
            with suppress(OSError, ValueError):  # a full disk
                print(f"this rank ends: {failure}", file=sys.stderr, flush=True)
            if ending.reports_failure_of(failure):
                ending.say(f"ends because another rank failed first: {failure}")
        if self._over.wait(self.PATIENCE_SECONDS):
            return
        self._settle(SETTLE_SECONDS)
        if ending.failing.is_set() and not ending.reported.is_set():
            ending.reported.wait(SETTLE_SECONDS)
            self._over.wait(self.PATIENCE_SECONDS)
        os._exit(Status.FAILED)


def end_sentence(error: BaseException, where: str = "") -> str:
    """Type and message of an error in one line; of memory that could not be had, how much, and what needs less."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    if reason := lost_rank_message(error):
        return f"the connection to another rank was lost ({reason}); that rank or its node was killed, or left"
    if (asked := memory_asked(error)) is not None:
        return f"out of memory{asked}; {_SMALLER_STEP if where.startswith('step') else _SMALLER_MODEL}"
    if isinstance(error, OSError) and error.errno is not None:
        return system_error_sentence(error)
    return f"{type(error).__name__}: {lines[0]}".rstrip(": ")


_SMALLER_STEP = (
    "use a smaller train.micro_batch_size or train.sequence_length, train.recompute=full, or ranks that share sequences: "
    "parallel.context_parallel_size"
)
_SMALLER_MODEL = (
    "share the model among more ranks with parallel.zero_stage=3, parallel.tensor_parallel_size or "
    "parallel.pipeline_parallel_size, or make it smaller: "
    "model.hidden_size, model.intermediate_size, model.num_hidden_layers, model.vocab_size"
)
