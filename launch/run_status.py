"""How a run stands, by what it left in its directory: done, stopped, ended by an error, running or killed."""

import time
from contextlib import suppress
from pathlib import Path

from launch.exit_status import STOPPED_FILE
from launch.run_end import first_failure
from trainer.checkpoint.directory import directory_name
from trainer.checkpoint.manifest import FILE
from trainer.monitoring.progress import format_duration
from trainer.monitoring.records import FILE_NAME
from trainer.monitoring.watchdog import LONGEST_PAUSE_SECONDS, silent_seconds

KILLED_AFTER_SECONDS = 3 * LONGEST_PAUSE_SECONDS
"""A run whose first rank touched its heartbeat file longer ago does not run any more."""


def run_status(directory: Path, step: int, steps: int | None) -> str:
    """One sentence without a full stop, as `step 410 of 2,000: killed, ...`.

    Args:
        directory: of the run.
        step: of its last record, updates.
        steps: train.steps; None where the directory does not say.
    """
    return f"step {step:,}{'' if steps is None else f' of {steps:,}'}: {_how(directory, step, steps)}"


def _how(directory: Path, step: int, steps: int | None) -> str:
    silent = silent_seconds(directory / "logs" / "rank-0.log")
    running = silent is not None and silent < KILLED_AFTER_SECONDS
    if stopped := _stop_sentence(directory):
        return stopped
    finished = steps is not None and step >= steps
    if finished and not running and (directory / "checkpoints" / directory_name(step) / FILE).is_file():
        return "done"  # a later start that was refused leaves a failure behind
    if failure := first_failure(directory):
        return f"ended by an error: {failure}"
    if silent is not None:
        state = "running" if running else "killed"
        return f"{state}, last heartbeat {format_duration(silent)} ago" + ("" if running else "; the same command resumes")
    if finished:
        return "done"
    age = time.time() - (directory / FILE_NAME).stat().st_mtime
    return f"not done, last record {format_duration(age)} ago"


def _stop_sentence(directory: Path) -> str:
    """What RUN/stopped says, without its date; "" where there is none."""
    with suppress(OSError, UnicodeDecodeError):
        _, _, sentence = (directory / STOPPED_FILE).read_text().strip().split(" ", 2)
        return sentence
    return ""
