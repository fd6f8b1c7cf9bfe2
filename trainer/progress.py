"""The line a person watches: live in a terminal, one plain line a report elsewhere (a log file, a pipe, SLURM)."""

import math
from typing import Any, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar


class Progress:
    """How far, how well, how fast, how long, how safe.

    Args:
        steps: optimizer updates in the whole run.
        tokens_per_step: target tokens an update, over all ranks.
        stream: where to write, usually sys.stdout; None on ranks that stay quiet.
    """

    def __init__(self, steps: int, tokens_per_step: int, stream: TextIO | None) -> None:
        self._steps = steps
        self._tokens_per_step = tokens_per_step
        self._stream = stream
        self._bar: Bar | None = None
        if stream is not None and stream.isatty():
            # no refresh thread: nothing of ours runs beside the training
            console = Console(file=stream, highlight=False)
            self._bar = Bar(TextColumn("{task.description}"), BarColumn(bar_width=None), console=console, auto_refresh=False)
            self._task = self._bar.add_task("starting", total=steps)
            self._bar.start()

    def update(self, step: int, loss: float, tokens_per_second: float, checkpoint_age_seconds: float | None = None) -> None:
        """Show the state after `step` updates; `loss` in nats a token, None = nothing saved yet."""
        text = self._text(step, loss, tokens_per_second, checkpoint_age_seconds)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text, refresh=True)
        elif self._stream is not None:
            print(text, file=self._stream, flush=True)

    def line(self, text: str) -> None:
        """Print a line of its own, above the live line where there is one."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif self._stream is not None:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Leave the last state on the screen."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _text(self, step: int, loss: float, tokens_per_second: float, checkpoint_age_seconds: float | None) -> str:
        left_tokens = (self._steps - step) * self._tokens_per_step
        eta = duration(left_tokens / tokens_per_second) if tokens_per_second > 0 else "unknown"
        saved = "not saved yet" if checkpoint_age_seconds is None else f"saved {duration(checkpoint_age_seconds)} ago"
        width = len(str(self._steps))
        return f"step {step:>{width}}/{self._steps}  loss {loss:.4f}  {count(tokens_per_second)} tokens/s  ETA {eta}  {saved}"


def duration(seconds: float) -> str:
    """Seconds as a person says them: 9s, 3m10s, 2h05m, 12d03h."""
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


def count(number: float) -> str:
    """A number in three or four digits: 950, 12.3k, 4.56M, 1.2B."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if number >= size:
            scaled = number / (1e3 if letter == "k" else size)
            return f"{scaled:.2f}{letter}" if scaled < 10 else f"{scaled:.1f}{letter}"
    return f"{number:,.0f}"
