"""torchrun inside this process. What `tiglon train` uses of torch.distributed.elastic's internals is here and nowhere else."""

import logging
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import psutil
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler
from torch.distributed.run import parse_args, run

from launch.interrupts import interrupts_held

LOGGERS = "torch.distributed.elastic"


def run_torchrun(options: list[str]) -> signal.Signals | Mapping[int, ProcessFailure] | None:
    """Run torchrun with its command-line options until its ranks have ended.

    Its loggers are muted: the ranks themselves say how they ended, or launch/commands/train.py does.

    Returns:
        None if every rank left with status 0; the signal given to `forward_signal` where one ended the ranks; else the
        ranks that failed, each with its exit code (minus the signal that killed it) and the second in which it ended.
    """
    try:
        for name in [name for name in logging.root.manager.loggerDict if name.startswith(LOGGERS)]:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        # torchrun's own handlers would start the shutdown anew at a second signal, and would answer one that nohup ignores
        with _ranks_hold_interrupts():
            run(parse_args(["--signals-to-handle=SIGUSR2", *options]))
    except SignalException as error:
        return error.sigval
    except ChildFailedError as error:
        return error.failures
    return None


@contextmanager
def _ranks_hold_interrupts() -> Iterator[None]:
    """While torchrun starts a rank, and only then: this process itself is to hear of a Ctrl-C at all other times."""
    start = SubprocessHandler._popen

    def start_held(*args: Any, **options: Any) -> Any:
        with interrupts_held():
            return start(*args, **options)

    SubprocessHandler._popen = start_held
    try:
        yield
    finally:
        SubprocessHandler._popen = start


def forward_signal(number: int) -> NoReturn:
    """From a signal handler during `run_torchrun`: torchrun sends the signal to its ranks, waits for them
    (TORCH_ELASTIC_SHUTDOWN_TIMEOUT), kills what is left, and ends."""
    raise SignalException("", sigval=signal.Signals(number))


def kill_ranks() -> None:
    """Kill what is left of the ranks and of what they started: torchrun gives every rank a process group of its own."""
    for child in psutil.Process().children():
        with suppress(ProcessLookupError, PermissionError):
            if os.getpgid(child.pid) == child.pid:
                os.killpg(child.pid, signal.SIGKILL)
