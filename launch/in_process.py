"""Train inside a program of the user's, a notebook say: for tiglon.py. Failures are exceptions; the process stays as it was."""

import ctypes
import os
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import TextIO, cast

import torch.distributed as dist

from launch import runtime
from launch.config import RunConfig
from launch.exit_status import Status
from launch.inputs import check_inputs
from launch.run_end import RunEnd
from launch.train import train_rank
from trainer.session import RunEnded


class RaisedEnd(RunEnd):
    """The end of a run as an exception: it keeps what a command would print.

    Attributes:
        error: what has ended the run; None if nothing has.
        explanation: why, in one sentence.
        reached: step and checkpoint of a run that has trained to its last step or was stopped, and is saved.
    """

    def __init__(self, world: runtime.World, screen: TextIO, directory: Path, keep_log: Callable[[], Path | None]) -> None:
        super().__init__(world, screen, directory, keep_log)
        self.error: BaseException | None = None
        self.explanation = ""
        self.reached: tuple[int, str] | None = None
        self.ends_process = world.launched

    def complete(self, step: int, path: str) -> None:
        """Keep it for the caller."""
        self.reached = step, path

    def failed(self, error: BaseException) -> Status:
        """As for a command, but it is the caller who says why."""
        self.error = error
        return super().failed(error)

    def explain(self, sentence: str) -> None:
        """Keep it for the exception."""
        self.explanation = sentence

    def leave(self, status: int) -> None:
        """Ranks leave; a process of the user's is interrupted, as by any Ctrl-C, when it comes back to Python code."""
        if self.ends_process:
            super().leave(status)
        main = ctypes.c_ulong(cast(int, threading.main_thread().ident))
        ctypes.pythonapi.PyThreadState_SetAsyncExc(main, ctypes.py_object(KeyboardInterrupt))


class BorrowedOutput(runtime.RedirectedOutput):
    """Redirects like a command does, the streams of a notebook too, until it is closed."""

    def __init__(self) -> None:
        self._streams, self._descriptors = (sys.stdout, sys.stderr), (os.dup(1), os.dup(2))
        for stream in self._streams:
            stream.flush()
        sys.stdout, sys.stderr = (
            open(descriptor, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
            for descriptor in (1, 2)
        )
        super().__init__()
        self._screen_copy = self.screen
        if not _writes_to(self._streams[1], 2):
            self.screen = self._streams[1]

    def close(self) -> None:
        """Put everything back."""
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):  # a full disk
                stream.flush()
        sys.stdout, sys.stderr = self._streams
        for number, descriptor in enumerate(self._descriptors, 1):
            os.dup2(descriptor, number)
            os.close(descriptor)
        self.screen = self._screen_copy
        super().close()


def _writes_to(stream: TextIO, descriptor: int) -> bool:
    try:
        return stream.fileno() == descriptor
    except (OSError, AttributeError):  # a notebook's, or one that only collects text
        return False


def train_here(asked: RunConfig) -> tuple[int, str]:
    """Train to the last step in this process, alone or as a rank of torchrun; the step reached, and its checkpoint.

    Raises:
        ValueError, FileNotFoundError, PermissionError: a mistake of the user's, found before training began.
        RunEnded: the run failed; the sentence says why and what there is to resume from.
        KeyboardInterrupt: it was stopped by a signal and is saved (a rank that torchrun watches leaves with status 0).
    """
    if threading.current_thread() is not threading.main_thread():
        raise ValueError("training was started in another thread than the main one, which alone hears Ctrl-C; start it there")
    if dist.is_initialized():
        raise ValueError(
            "torch.distributed is initialized in this process already and a run makes process groups of its own; call "
            "torch.distributed.destroy_process_group() before"
        )
    world = runtime.world()
    if world.elastic:
        runtime.die_with_parent()
    with runtime.restored_process(), ExitStack() as resources:
        inputs = check_inputs(asked, world)
        resources.callback(inputs.data.close)
        output = BorrowedOutput()
        resources.callback(output.close)
        ending = RaisedEnd(world, output.screen, inputs.directory, partial(output.to_log, inputs.log))
        status = train_rank(inputs, ending, output, resources)
    if ending.reached is None:
        raise _exception(ending, status)
    step, path = ending.reached
    if step < asked.train.steps:
        if world.elastic:
            raise SystemExit(Status.DONE)
        raise KeyboardInterrupt(f"training was stopped at step {step} and is saved in {path}; the same call resumes")
    return ending.reached


def _exception(ending: RaisedEnd, status: Status) -> BaseException:
    """Without the error's traceback, which stands in the log: its frames would keep the network in memory."""
    if status == Status.INTERRUPTED:
        return KeyboardInterrupt("interrupted before training began")
    if status == Status.MISTAKE and ending.error is not None:
        return ending.error.with_traceback(None)
    return RunEnded(ending.explanation or str(ending.error))
