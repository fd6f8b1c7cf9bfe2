"""Exit statuses of the program. docs/operate.md says what each tells a script."""

from enum import IntEnum
from pathlib import Path


class Status(IntEnum):
    """Of `tiglon`; ranks that torchrun watches leave with 0 instead of STOPPED."""

    DONE = 0
    FAILED = 1
    MISTAKE = 2
    HUNG = 75
    """Of the watchdog (trainer/watchdog.py): EX_TEMPFAIL of sysexits.h, try again."""
    STOPPED = 85
    """Stopped by a signal and saved: the same command resumes. (HTCondor's value for "checkpointed".)"""
    INTERRUPTED = 130
    """128 + SIGINT, as a shell says of a program that Ctrl-C ended."""


STOPPED_FILE = "stopped"
"""RUN/stopped is there from an orderly stop to the next start of training. It holds the sentence that was on the screen."""


def was_stopped(run_dir: str | Path) -> bool:
    """Whether the run in this directory was last stopped by a signal, and saved."""
    return (Path(run_dir) / STOPPED_FILE).is_file()
