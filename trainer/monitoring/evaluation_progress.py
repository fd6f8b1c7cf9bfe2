"""How far a long evaluation is: a sentence now and then, none for a short one."""

import time
from collections.abc import Callable

from trainer.monitoring.progress import format_duration

SECONDS = 10.0
"""Between two sentences, and before the first."""


class EvaluationProgress:
    """Called after every forward of an evaluation.

    Args:
        what: is evaluated, the beginning of the sentence.
        forwards: of this rank, all together.
        say: shows a sentence.
        beat: called each time too: the process is alive.
        clock: seconds.
    """

    def __init__(
        self,
        what: str,
        forwards: int,
        say: Callable[[str], object],
        beat: Callable[[], object] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._what, self._forwards, self._say, self._beat, self._clock = what, forwards, say, beat, clock
        self._done, self._begun = 0, clock()
        self._said = self._begun

    def __call__(self) -> None:
        """One more forward is done."""
        self._beat()
        self._done += 1
        now = self._clock()
        if now - self._said >= SECONDS and self._done < self._forwards:
            self._said = now
            share, taken = 100 * self._done // self._forwards, format_duration(now - self._begun)
            self._say(f"{self._what}: {self._done:,} of {self._forwards:,} forwards ({share} %) after {taken}")
