"""SIGTERM and SIGUSR1 ask for a checkpoint and an orderly end within the grace period."""

import math
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What a scheduler sends before it takes the machine away: torchrun and SLURM on cancel, SLURM before a time limit."""
LAST_WORD = 0.9
"""Share of the grace period after which a run that is still there says so: later it might be killed first."""


class StopSignal:
    """Remembers the first stop signal. The handler only sets a value: saving inside it could find a tensor half written.

    Ranks may hear the signal at different moments; the loop agrees over all of them before it acts.

    Args:
        grace_seconds: time from the signal to the end.
        late: called once, on a thread of its own, when LAST_WORD of that time is over and the run is still there. It can
            only tell: whoever sent the signal may kill the run now, and a save that is not killed still counts.
    """

    def __init__(self, grace_seconds: float = math.inf, late: Callable[[], None] = lambda: None) -> None:
        self.requested: str | None = None
        """Name of the signal, for example "SIGTERM"; None while nobody asked."""
        self._before: dict[int, Any] = {}
        self._patience = min(LAST_WORD * grace_seconds, threading.TIMEOUT_MAX)
        self._late = late
        self._heard, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._wait, name="grace", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._over.set()
        self._heard.set()
        self._thread.join()

    def request(self, name: str) -> None:
        """Somebody asked; the first one counts."""
        if self.requested is None:
            self.requested = name
            self._heard.set()

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.request(signal.Signals(number).name)

    def _wait(self) -> None:
        self._heard.wait()
        if not self._over.wait(self._patience):
            self._late()
