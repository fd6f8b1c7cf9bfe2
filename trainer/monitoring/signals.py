"""Signals that ask a run to save and end; a second one from the keyboard ends it at once."""

import math
import os
import select
import signal
import time
from collections.abc import Callable
from threading import TIMEOUT_MAX, Thread
from types import FrameType
from typing import Any, Self

import torch
import torch.distributed as dist

from model.parallel.mesh import Mesh
from trainer.monitoring.async_read import AsyncRead

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT)
"""Ctrl-C, a terminal that closes, and what schedulers send before they take the machine away."""
IMPATIENT = (signal.SIGINT, signal.SIGQUIT)
"""From the keyboard. The second of these ends the process at once."""
LAST_WORD = 0.9
"""Share of the grace period after which a run that has not ended yet prints so: later it might be killed first."""
ECHO_SECONDS = 0.1
"""A wrapper may forward a Ctrl-C that the terminal has sent as well; two within this time count as one."""


class StopSignal:
    """Remembers the first stop signal; it saves nothing itself, since a step may be in progress.

    A thread receives signals at once, also while the main thread is inside a kernel or waits for another rank. Ranks may
    receive a signal at different times; the loop agrees over all of them before it acts (StopVote). SIGHUP
    stays ignored where it was ignored at the start, as under nohup.

    Args:
        grace_seconds: time from the signal to the end.
        late: called once when LAST_WORD of that time is over and the run has not ended. It can only print: the sender may
        kill the
            run now, and a save that finishes before that still counts.
        heard: called with the name of the first signal if it is from the keyboard.
        leave: called with the name of the second signal from the keyboard; it ends the process. After SIGTERM a first Ctrl-C
        counts
            as the second.
    """

    def __init__(
        self,
        grace_seconds: float = math.inf,
        late: Callable[[], None] = lambda: None,
        heard: Callable[[str], None] = lambda name: None,
        leave: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.requested: str | None = None
        """Name of the signal, for example "SIGTERM"; None before the first."""
        self._requested_at = math.inf
        self._heard_at: float | None = None
        self._patience = min(LAST_WORD * grace_seconds, TIMEOUT_MAX)
        self._late, self._heard, self._leave = late, heard, leave
        self._before: dict[int, Any] = {}
        self._thread = Thread(target=self._listen, name="signals", daemon=True)

    def __enter__(self) -> Self:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread.start()
        for number in SIGNALS:
            before = signal.getsignal(number)
            if not (number == signal.SIGHUP and before == signal.SIG_IGN):
                self._before[number] = signal.signal(number, _nothing)  # the number reaches the thread through the pipe
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._write)  # which ends the thread
        self._thread.join()
        os.close(self._read)

    def over(self) -> None:
        """Ignore further signals: the exit status is decided. SIGQUIT keeps its action, in case the end takes long.

        (Python itself would restore the default actions while it ends.)
        """
        for number, before in self._before.items():
            signal.signal(number, before if number == signal.SIGQUIT else signal.SIG_IGN)
        self._before.clear()
        self._patience = math.inf

    @property
    def number(self) -> int:
        """Of the signal; 0 before the first."""
        return 0 if self.requested is None else int(signal.Signals[self.requested])

    def request(self, name: str) -> None:
        """Note a stop signal, also of another rank; the first one counts."""
        if self.requested is None:
            self.requested, self._requested_at = name, time.monotonic()

    def _listen(self) -> None:
        late_called = False
        while True:
            if not self._wait(late_called):
                late_called = True
                self._late()
                continue
            numbers = os.read(self._read, 64)
            if not numbers:
                return
            for number in numbers:
                if number in SIGNALS:
                    self._hear(signal.Signals(number))

    def _wait(self, late_called: bool) -> bool:
        """Whether there is something to read, now or before the grace period is nearly over."""
        while True:
            left = self._requested_at + self._patience - time.monotonic()
            if left <= 0 and not late_called:
                return False
            # another rank may call `request` meanwhile, without a signal here
            pause = 1.0 if late_called or math.isinf(self._requested_at) else min(left, 1.0)
            if select.select([self._read], [], [], pause)[0]:
                return True

    def _hear(self, number: signal.Signals) -> None:
        if self._heard_at is None:  # `request` may have been called for another rank before
            self._heard_at = time.monotonic()
            self.request(number.name)
            if number in IMPATIENT:
                self._heard(number.name)
        elif number in IMPATIENT and time.monotonic() - self._heard_at > ECHO_SECONDS:
            self._leave(number.name)


class StopVote:
    """Whether any rank got a stop signal. Every rank asks at the same moments and gets the same answer."""

    def __init__(self, stop: StopSignal, mesh: Mesh) -> None:
        self._stop, self._mesh = stop, mesh
        self._read: AsyncRead | None = None

    def requested(self, wait: bool = True) -> bool:
        """The answer.

        Args:
            wait: on a CPU, wait for the answer of this call; else, and always on a GPU, return that of the call before, so that
                nothing is waited for.
        """
        group = self._mesh.world.group
        if group is None:
            return self._stop.requested is not None
        number = torch.full((), float(self._stop.number), device=self._mesh.device)
        work = dist.all_reduce(number, op=dist.ReduceOp.MAX, group=group, async_op=True)
        before, self._read = self._read, AsyncRead(number, work=work)
        read = self._read if wait and not number.is_cuda else before
        if read is None or not (largest := int(read.read()[0])):
            return False
        self._stop.request(signal.Signals(largest).name)
        return True


def _nothing(number: int, frame: FrameType | None) -> None:
    """Python writes the signal's number to the pipe only where it has a handler of its own."""
