"""Traces a window of steps: RUN/profile/steps-A-B-rank-N.json, for chrome://tracing and ui.perfetto.dev."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from torch.profiler import ProfilerActivity, profile

from trainer.config import ProfileConfig


class Profile:
    """Traces `settings.steps` steps from `settings.start_step` on; outside the window it costs nothing.

    Args:
        settings: the window; start_step = -1 is off.
        directory: the run directory.
        rank: part of the file's name.
        say: called with a sentence when a trace cannot be written, which does not end the run.
    """

    def __init__(
        self, settings: ProfileConfig, directory: Path, rank: int, say: Callable[[str], None] = lambda text: None
    ) -> None:
        self._say = say
        self._first = settings.start_step
        self._end = settings.start_step + settings.steps
        self._directory = directory / "profile"
        self._rank = rank
        self._profiler: profile | None = None
        self._opened_at = self._step = 0

    def before(self, step: int) -> None:
        """Call before each step. A run that resumes inside the window traces the rest of it."""
        if self._profiler is not None and step >= self._end:
            self._finish(step)
        if self._first >= 0 and self._profiler is None and self._first <= step < self._end:
            kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self._profiler = profile(activities=kinds, record_shapes=True)
            self._profiler.start()
            self._opened_at = step
        self._step = step

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._profiler is not None:
            self._finish(self._step + 1)

    def _finish(self, end: int) -> None:
        assert self._profiler is not None
        path = self._directory / f"steps-{self._opened_at}-{end - 1}-rank-{self._rank}.json"
        try:
            self._profiler.stop()
            self._directory.mkdir(parents=True, exist_ok=True)
            self._profiler.export_chrome_trace(str(path))
        except Exception as error:
            self._say(f"profile: {path} cannot be written ({error}); training is not affected")
        self._profiler = None
