"""Ctrl-C: when it ends the program at once, when it is an exception, when it waits. Imports little: it is there first."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Thread
from typing import Any

from launch.exit_status import Status

LAUNCHER = "TIGLON_LAUNCHER"
"""Process that started this rank, where `tiglon train --nproc` did."""

_received: list[int] = []
_sentences: list[str] = []
"""What is said of an interrupt that ends the program at once, innermost last; none: it is a KeyboardInterrupt."""


def interrupted() -> bool:
    """Whether Ctrl-C was pressed; the library that was interrupted may have swallowed it, or failed with another error."""
    return bool(_received)


def launcher_reports_interrupts() -> bool:
    """Whether this is a rank of `tiglon train --nproc`, which itself reports that Ctrl-C ended its ranks."""
    return os.environ.get(LAUNCHER) == str(os.getppid())


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Programs of ours that are started meanwhile get a Ctrl-C only in launch/__main__.py, which lets it through: one that
    comes while Python starts would end it with a traceback."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def interrupts_end_at_once(sentence: str = "interrupted") -> Iterator[None]:
    """Where there is nothing to lose, above all in imports: KeyboardInterrupt would abort the process where C++ code meets it,
    as torch's does while it sets up its collectives, and some modules swallow it.

    Args:
        sentence: what is then said on stderr; "" where another process says it.
    """
    _sentences.append(sentence)
    try:
        yield
    finally:
        _sentences.pop()


def take_interrupts() -> None:
    """Answer Ctrl-C as this module says, from here on; not where it is ignored, as under nohup."""
    _received.clear()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
        sys.unraisablehook = _unraisable


def takes_interrupts() -> bool:
    """Whether Ctrl-C is answered by this module."""
    return signal.getsignal(signal.SIGINT) is _interrupt


def _interrupt(number: int, frame: object) -> None:
    _received.append(number)
    if _sentences:
        if _sentences[-1] and not launcher_reports_interrupts():
            with suppress(OSError):
                os.write(2, f"tiglon: {_sentences[-1]}\n".encode())
        os._exit(Status.INTERRUPTED)
    raise KeyboardInterrupt


def _unraisable(unraisable: Any) -> None:
    if issubclass(unraisable.exc_type, KeyboardInterrupt) and takes_interrupts():
        send_again(signal.SIGINT)
    else:
        sys.__unraisablehook__(unraisable)


def send_again(number: int) -> None:
    """Send this process a signal a little later: Python prints and drops what its handler raised while an object was freed."""

    def send() -> None:
        time.sleep(0.01)
        os.kill(os.getpid(), number)

    Thread(target=send, daemon=True).start()
