"""Exit statuses of `tiglon`; docs/operate.md says what each means to a script."""

from enum import IntEnum
from pathlib import Path


class Status(IntEnum):
    """Ranks that torchrun watches leave with DONE instead of STOPPED."""

    DONE = 0
    FAILED = 1
    MISTAKE = 2
    HUNG = 75
    """No progress for health.hang_seconds (trainer/monitoring/watchdog.py): EX_TEMPFAIL of sysexits.h, try again."""
    STOPPED = 85
    """Stopped by a signal and saved: the same command resumes. (HTCondor's value for "checkpointed".)"""
    INTERRUPTED = 130
    """128 + SIGINT, as a shell says of a program that Ctrl-C ended."""


STOPPED_FILE = "stopped"
"""RUN/stopped exists from an orderly stop to the next start of training. It holds the sentence that was on the screen."""


def was_stopped(run_dir: str | Path) -> bool:
    """Whether the run in this directory was last stopped by a signal, and saved."""
    return (Path(run_dir) / STOPPED_FILE).is_file()
