"""torchrun inside this process. What `tiglon train` uses of torch.distributed.elastic's internals is here and nowhere else."""

import logging
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import psutil
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler
from torch.distributed.run import parse_args, run

from launch.interrupts import interrupts_held

LOGGERS = "torch.distributed.elastic"


Failures = Mapping[int, ProcessFailure]
"""By rank: exit code (minus the signal that killed it), and the second in which it ended."""


def run_torchrun(
    options: list[str], failed: Callable[[Failures], object] = lambda failures: None
) -> signal.Signals | Failures | None:
    """Run torchrun with its command-line options until its ranks have ended.

    Its loggers are muted: the ranks themselves say how they ended, or launch/commands/train.py does.

    Args:
        failed: called when ranks have failed, before torchrun starts all of them again or gives up.

    Returns:
        None if every rank left with status 0; the signal given to `forward_signal` where one ended the ranks; else the
        ranks that failed.
    """
    try:
        for name in [name for name in logging.root.manager.loggerDict if name.startswith(LOGGERS)]:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        # torchrun's own handlers would start the shutdown anew at a second signal, and would answer one that nohup ignores
        with _ranks_hold_interrupts(), _failures_told(failed):
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


@contextmanager
def _failures_told(failed: Callable[[Failures], object]) -> Iterator[None]:
    """Call `failed` with what torchrun's watch over its ranks finds."""
    agent: Any = LocalElasticAgent
    watch = agent._monitor_workers

    def watch_and_tell(*args: Any) -> Any:
        result = watch(*args)
        if result.failures:
            failed(result.failures)
        return result

    agent._monitor_workers = watch_and_tell
    try:
        yield
    finally:
        agent._monitor_workers = watch


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
