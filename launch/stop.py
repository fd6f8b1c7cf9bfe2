"""Stop signals: what the screen says of them, and RUN/stopped, which an orderly stop leaves behind."""

import time
from contextlib import suppress
from pathlib import Path

from launch.exit_status import STOPPED_FILE, Status
from launch.run_end import RunEnd
from trainer.monitoring.signals import LAST_WORD, StopSignal


def stop_signal(grace_seconds: float, ending: RunEnd, reports: bool) -> StopSignal:
    """The handler of stop signals of one rank, not yet installed.

    Args:
        grace_seconds: health.grace_seconds.
        ending: knows how far the run is and how to say it.
        reports: whether this rank speaks for all: rank 0.
    """

    def report_late() -> None:
        if reports and not ending.saved():
            ending.say(
                f"{LAST_WORD * grace_seconds:g} s after the stop signal the run is not saved yet (health.grace_seconds = "
                f"{grace_seconds:g}); {ending.kept() or 'it has not begun'}"
            )

    def report_signal(name: str) -> None:
        if not reports:
            return
        if ending.failing.is_set():
            ending.say(f"{name}: the run is about to end; a second {name} leaves at once")
        elif ending.finished():
            ending.say(f"{name}: all steps are done and saved, the last evaluation is finished; a second {name} leaves at once")
        else:
            ending.say(f"{name}: the run saves and leaves; a second {name} leaves at once, without saving")

    def leave(name: str) -> None:
        if reports:
            ending.say(f"left at once by a second {name}; {ending.kept() or 'it had not begun'}")
        ending.leave(Status.DONE if ending.finished() else Status.INTERRUPTED)

    return StopSignal(grace_seconds, report_late, report_signal, leave)


def record_stop(directory: Path, sentence: str) -> None:
    """Write RUN/stopped; where the disk is full the exit status alone has to tell."""
    with suppress(OSError):
        (directory / STOPPED_FILE).write_text(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {sentence}\n", encoding="utf-8")


def clear_stop(directory: Path) -> None:
    """Remove RUN/stopped: training begins again."""
    (directory / STOPPED_FILE).unlink(missing_ok=True)
