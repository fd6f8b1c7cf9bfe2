"""How a program ends: one sentence on stderr and a status, whatever happened; never a traceback on the screen."""

import atexit
import ctypes
import errno
import io
import os
import re
import select
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import NoReturn, TextIO

from launch.exit_status import Status
from launch.interrupts import interrupted, launcher_reports_interrupts, take_interrupts, takes_interrupts
from trainer.printable import printable

USERS = (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
"""Mistakes that a user can fix by asking for something else: status 2. Every other error is 1."""
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_MEMORY = re.compile(r"out of memory|allocate memory|bad_alloc", re.IGNORECASE)
_ASKED = re.compile(r"(?:(?:tried|unable) to allocate|alloc of size) ([\d.]+) ?(bytes|[kmgtpe]i?b)?", re.IGNORECASE)


def run(program: Callable[[], int | None]) -> NoReturn:
    """Run a program to its end, say in one sentence why if that is not its own end, and leave this process.

    The exit status is the program's own (None = 0), 2 for a mistake of the user's, 130 for Ctrl-C, else 1. A reader of our
    output who leaves (`| head -1`) ends the program with 1 and no sentence.
    """
    open_standard_streams()
    escape_what_cannot_be_encoded()
    take_interrupts()
    try:
        status = program() or 0
        if sys.stdout is not None:
            sys.stdout.flush()  # now, while there is someone to hear of an error
    except BaseException as error:
        if takes_interrupts():
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # while the sentence is written
        asked = interrupted() and not isinstance(error, SystemExit)
        status, sentence = (Status.INTERRUPTED, "interrupted") if asked else status_and_sentence(error)
        if status == Status.INTERRUPTED and launcher_reports_interrupts():
            sentence = ""
        if sentence and sys.stderr is not None:
            with suppress(OSError):
                print(f"tiglon: {printable(sentence)}", file=sys.stderr)
    _leave(status)


def _leave(status: int) -> NoReturn:
    """End this process as Python does, except that Python does not take itself down: where a thread is inside C++ code
    meanwhile, as those of torch's process groups may be, it is aborted, with status 134 though all is saved."""
    if takes_interrupts():
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a Ctrl-C while threads are waited for ends the process
    threading._shutdown()  # type: ignore[attr-defined]  # private, as the next: Python has no public name for its end
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        discard_unwritable(stream)
    ctypes.CDLL(None).fflush(None)  # what C code has printed
    os._exit(status)


def open_standard_streams() -> None:
    """Open /dev/null for a standard stream that was closed at the start (`>&-`): the next file opened would get its number.

    `sys.stdin` and its like are then None, and are set for the whole process.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115


def escape_what_cannot_be_encoded() -> None:
    """Write a character that a standard stream's encoding lacks (PYTHONIOENCODING=ascii, a locale without UTF-8) as its escape.

    An error handler that somebody has chosen stays.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def status_and_sentence(error: BaseException) -> tuple[int, str]:
    """Exit status and sentence for what ended a program; "" where nothing is to be said."""
    if isinstance(error, SystemExit):
        return (error.code, "") if isinstance(error.code, int) else (1, error.code) if error.code else (0, "")
    if any(isinstance(cause, KeyboardInterrupt) for cause in _chain(error)):  # C code turns it into errors of its own
        return Status.INTERRUPTED, "interrupted"
    if isinstance(error, BrokenPipeError) and _reader_left():
        return 1, ""
    if (asked := memory_asked(error)) is not None:
        return 1, f"out of memory{asked}; ask for less, or run it where there is more"
    if isinstance(error, OSError):
        return 2 if isinstance(error, USERS) else 1, system_error_sentence(error)
    if isinstance(error, USERS):
        return 2, _line(error)
    first = str(error).strip().partition("\n")[0]
    return 1, f"{type(error).__name__}: {first}; {keep_traceback(error)}"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and its causes."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def memory_asked(error: BaseException) -> str | None:
    """How much memory an error is about, as " (so much of host memory)"; None if it is about something else."""
    text = str(error)
    in_words = isinstance(error, RuntimeError) and _NO_MEMORY.search(text)
    if not (in_words or isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)):
        return None
    device, size = "GPU" if "CUDA" in text else "host", _ASKED.search(text)
    if size is None:
        return " on the GPU" if device == "GPU" else ""
    number, unit = size[1].rstrip("."), size[2] or "bytes"
    amount = f"{int(float(number)) / 2**30:,.2f} GiB" if unit == "bytes" else f"{number} {unit}"
    return f" ({amount} of {device} memory asked for at once)"


def system_error_sentence(error: OSError) -> str:
    """File and reason of an operating-system error; our own, and those of an object store, are sentences already."""
    if error.errno is None:
        return _line(error)
    reason = os.strerror(error.errno) if error.errno in errno.errorcode else _line(error)
    where = "standard output" if error.filename is None and _is_output(error) else error.filename
    named = f"{os.fsdecode(where)}: " if isinstance(where, str | bytes) else ""
    return f"{named}{reason}" + ("; make room there and run the same again" if error.errno in _FULL else "")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split("\n")).strip() or type(error).__name__


def keep_traceback(error: BaseException) -> str:
    """Write the traceback where its reader finds it; what to say of it."""
    try:
        handle, path = tempfile.mkstemp(prefix="tiglon-", suffix=".traceback")
        with open(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            traceback.print_exception(error, file=file)
    except OSError as reason:
        return f"its traceback could not be kept ({reason.strerror or reason})"
    return f"the traceback is in {path}"


def _is_output(error: OSError) -> bool:
    """Whether it was our output that could not be written: raised by what prints, or by the last flush, here."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "").partition(".")[0] in ("rich", "typer", "click") or frame.f_code is run.__code__


def _reader_left() -> bool:
    """Whether the reader of our output has gone. (A connection to an object store can break like a pipe.)"""
    asked = select.poll()
    for descriptor in (1, 2):
        asked.register(descriptor, 0)  # errors are reported unasked
    return any(event & (select.POLLERR | select.POLLNVAL) for _, event in asked.poll(0))


def discard_unwritable(stream: TextIO | None) -> None:
    """Send what a stream still holds to /dev/null if it cannot be written: Python would report it while it ends."""
    if stream is None or stream.closed:
        return
    try:
        stream.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
