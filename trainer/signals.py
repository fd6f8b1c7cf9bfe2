"""SIGTERM and SIGUSR1 ask for a checkpoint and an orderly end; the loop answers between two steps."""

import signal
from types import FrameType
from typing import Any, Self

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What a scheduler sends before it takes the machine away: torchrun and SLURM on cancel, SLURM before a time limit."""


class StopSignal:
    """Remembers the first stop signal. The handler only sets a value: saving inside it could find a tensor half written.

    Ranks may hear the signal at different steps; the loop agrees over all of them before it acts.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        """Name of the signal, for example "SIGTERM"; None while nobody asked."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.requested is None:
            self.requested = signal.Signals(number).name
