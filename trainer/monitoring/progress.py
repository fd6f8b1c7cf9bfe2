"""Progress on the screen: a live line in a terminal, one plain line per update elsewhere (a log file, a pipe, SLURM)."""

import math
from collections.abc import Callable
from typing import Any, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from trainer.printable import printable


class Progress:
    """Step, loss, speed, time left and age of the last checkpoint.

    Args:
        steps: optimizer updates in the whole run.
        tokens_before: target tokens of the first so many batches, over all ranks.
        stream: where to write, usually sys.stdout; None on ranks that print nothing.
    """

    def __init__(self, steps: int, tokens_before: Callable[[int], int], stream: TextIO | None) -> None:
        self._steps = steps
        self._tokens_before = tokens_before
        self._stream = stream
        self._bar: Bar | None = None
        if stream is not None and stream.isatty():
            # no refresh thread, which would take time from the training
            console = Console(file=stream, highlight=False)
            columns = TextColumn("{task.description}"), BarColumn(bar_width=None)
            self._bar = Bar(
                *columns, console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
            )  # what libraries print goes to the rank's log
            self._task = self._bar.add_task("starting", total=steps)
            self._bar.start()

    def update(
        self, step: int, loss: float, tokens_per_second: float, safety: str = "not saved yet", passed_over: int = 0
    ) -> None:  # fmt: skip
        """Show the state after `step` updates.

        Args:
            loss: nats per token.
            safety: from checkpoint_age.
            passed_over: batches that rewinds left behind, which no update has used.
        """
        tokens = self._tokens_before(self._steps + passed_over) - self._tokens_before(step + passed_over)
        text = self._text(step, loss, tokens_per_second, tokens, safety)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text, refresh=True)
        elif self._stream is not None:
            print(text, file=self._stream, flush=True)

    def line(self, text: str) -> None:
        """Print a separate line, above the live line where there is one."""
        if self._bar is not None:
            self._bar.console.print(printable(text), markup=False, highlight=False, soft_wrap=True)
        elif self._stream is not None:
            print(f"{printable(text)}\n", end="", file=self._stream, flush=True)  # in one write: two threads may print

    def close(self) -> None:
        """Leave the last state on the screen."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _text(self, step: int, loss: float, tokens_per_second: float, left_tokens: int, safety: str) -> str:
        eta = format_duration(left_tokens / tokens_per_second) if tokens_per_second > 0 else "unknown"
        width = len(str(self._steps))
        speed = format_count(tokens_per_second)
        return f"step {step:>{width}}/{self._steps}  loss {loss:.4f}  {speed} tokens/s  ETA {eta}  {safety}"


def checkpoint_age(checkpoint: tuple[int, float | None] | None, now: float) -> str:
    """How long ago a checkpoint was taken, in words.

    Args:
        checkpoint: of the newest complete one, step and time (s, monotonic), None for the time if an earlier process took it,
        whose
            clock is another; None if there is none.
    """
    if checkpoint is None:
        return "not saved yet"
    step, taken = checkpoint
    return f"saved at step {step}" if taken is None else f"saved {format_duration(now - taken)} ago"


def left_behind(step: int, batch: int) -> str:
    """One sentence where the number of the next batch is not the step; else ""."""
    if batch == step:
        return ""
    passed = plural(batch - step, "batch", "batches")
    return (
        f"step {step:,} continues with batch {batch:,}, since rewinds left {passed} behind: train.batch_ramp, "
        "train.length_ramp and data.curriculum count batches"
    )


def format_duration(seconds: float) -> str:
    """Seconds as 9s, 3m10s, 2h05m or 12d03h."""
    if not math.isfinite(seconds):
        return "unknown"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def format_count(number: float) -> str:
    """A number in three or four digits: 950, 12.3k, 4.56M, 1.20B, 15.0T."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= 0.99995 * size:  # from there on the smaller unit would show 1000.0
            scaled = number / size
            return f"{scaled:.2f}{letter}" if scaled < 9.995 else f"{scaled:.1f}{letter}"
    return f"{number / 1e3:.1f}k" if number >= 9999.5 else f"{number:,.0f}"


def format_bytes(number: float) -> str:
    """Bytes in three digits and decimal units: 512 B, 1.23 kB, 45.6 MB, 789 GB, 1,230 TB."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB" if number < 999.5 else f"{number:,.0f} TB"


def format_perplexity(loss: float) -> str:
    """exp of a loss in nats per token: 23.41, 1,669.96; inf where a float would overflow."""
    return f"{math.exp(loss):,.2f}" if loss < 700 or math.isnan(loss) else "inf"


def plural(number: int, one: str, many: str = "") -> str:
    """A number and what is counted: 1 layer, 2 layers, 1,024 micro-batches (whose plural has to be given)."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"
