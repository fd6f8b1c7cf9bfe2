"""`tiglon train`: one rank in this process, or several with torchrun inside it, so that a signal to it reaches them, their
end is told in our words, and none of them is left behind."""

import logging
import os
import signal
import sys
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Self

import psutil
import typer
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import parse_args
from torch.distributed.run import run as torchrun

from launch import runtime
from launch.config import RunConfig, load, micro_batches
from launch.ending import first_failure
from launch.resume import read_life
from launch.start import begin, check_start, checkpoint_address
from launch.status import Status, was_stopped
from launch.train import main as train_main
from launch.train import open_data
from trainer.life import Life, life_in
from trainer.restore import directory_name, read_meta, steps
from trainer.signals import ECHO_SECONDS, IMPATIENT, SIGNALS
from trainer.store import join, open_store


def train_command(
    config: Annotated[str, typer.Argument(help="TOML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value ...")] = None,
    nproc: Annotated[int, typer.Option(help="Ranks on this computer; more than one goes through torchrun.")] = 1,
    max_restarts: Annotated[int, typer.Option(help="Restarts of the ranks after a failure; they resume.")] = 0,
) -> None:
    """Train, or carry on training.

    Exit status: 0 all steps are done and saved, 85 stopped by a signal and saved, 2 a mistake, else a failure.

    Example: tiglon train launch/configs/quickstart.toml --nproc 2 train.steps=100
    """
    arguments = [config, *(overrides or [])]
    if nproc == 1 and not max_restarts:
        raise typer.Exit(train_main(arguments))
    asked = load(config, overrides or [])
    micro_batches(asked, nproc)
    # a mistake is told once, before any rank starts
    first = runtime.World(rank=0, local_rank=0, world_size=nproc, local_world_size=nproc, restarts=0, launched=False)
    begun = begin(asked, first)
    data = open_data(begun.config, 0, nproc)
    check_start(begun, first, runtime.choose_device(begun.config.run.device, first), data.train)
    data.close()
    raise typer.Exit(run_ranks(nproc, max_restarts, begun.config, arguments))


def run_ranks(ranks: int, max_restarts: int, config: RunConfig, arguments: list[str]) -> int:
    """Run `tiglon train` with `arguments` on `ranks` ranks; the exit status (launch/status.py), 128 + number of the signal
    where one ended a rank, or the run before it was saved.

    Raises:
        ValueError: fewer than no restarts.
    """
    if max_restarts < 0:
        raise ValueError(f"--max-restarts must be at least 0, got {max_restarts}")
    runtime.set_environment({**runtime.rank_environment(ranks, config.health.grace_seconds), **runtime.launcher()})
    launch = uuid.uuid4().hex
    options = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", f"--rdzv-id={launch}"]  # as --standalone, with a name
    options += [f"--nproc-per-node={ranks}", f"--max-restarts={max_restarts}"]
    # torchrun's own handlers would start anew at a second signal, and answer one that nohup ignores
    options += ["--signals-to-handle=SIGUSR2", "-m", "launch", "train", *arguments]
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # how ranks end is told by them, and below
    found = _Found(config, launch)
    with _Signals(found) as signals:
        try:
            torchrun(parse_args(options))
        except SignalException as ended:
            signals.over = True
            end_ranks()
            return _after_signal(found, ended.sigval)
        except ChildFailedError as failed:
            signals.over = True
            return _after_failure(found, failed)
        finally:
            signals.over = True
            end_ranks()
    return Status.STOPPED if found.stopped() or 0 < found.newest()[0] < config.train.steps else Status.DONE


@dataclass(frozen=True)
class _Found:
    """What the ranks of this launch left in their directory; what earlier ones left there says nothing of them."""

    config: RunConfig
    launch: str

    def life(self) -> Life | None:
        """Of the run that the ranks have begun; None if they did not come so far."""
        recorded = read_life(self.config.run.dir)
        return life_in(recorded) if recorded and recorded.get("launch") == self.launch else None

    def stopped(self) -> bool:
        return self.life() is not None and was_stopped(self.config.run.dir)

    def finished(self) -> bool:
        return self.newest()[0] >= self.config.train.steps

    def failed(self) -> bool:
        """Whether one of them failed, and has said so."""
        return self.life() is not None and first_failure(Path(self.config.run.dir)) != ""

    def newest(self) -> tuple[int, str]:
        """Step and path of the newest complete checkpoint of the run; (0, "") if there is none."""
        life, address = self.life(), checkpoint_address(self.config)
        with suppress(OSError, ValueError):
            for step in reversed(steps(open_store(address)) if life else []):
                path = join(address, directory_name(step))
                if life_in(read_meta(path).extra.get("life", {})) == life:
                    return step, path
        return 0, ""

    def kept(self) -> str:
        if self.life() is None:
            return "training had not begun"
        _, path = self.newest()
        return f"the newest complete checkpoint is {path}" if path else "there is no complete checkpoint of this run"


def _after_signal(found: _Found, number: signal.Signals) -> int:
    """The ranks have saved and left, or were done just then, or their time was over."""
    if found.stopped():
        return Status.STOPPED
    if found.failed():
        return Status.FAILED
    if found.finished():
        return Status.DONE
    say(f"ended by {number.name} before the run was saved; {found.kept()}")
    return 128 + number


def _after_failure(found: _Found, failed: ChildFailedError) -> int:
    """A rank failed, and torchrun has ended the others. One that could speak has said why."""
    rank, failure = _first(failed.failures)
    log = Path(found.config.run.dir) / "logs" / f"rank-{rank}.log"
    place = f"; log: {log}" if log.exists() else ""
    if failure.exitcode > 0:
        if failure.exitcode == Status.FAILED and found.life() and not found.failed():
            say(f"rank {rank} ended with status {failure.exitcode} and could not say why; {found.kept()}{place}")
        return failure.exitcode
    name = signal.Signals(-failure.exitcode).name
    guess = "; out of memory? (dmesg tells)" if name == "SIGKILL" else ""
    say(f"rank {rank} was killed ({name}){guess}; {found.kept()}{place}")
    return 128 - failure.exitcode


def _first(failures: dict[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """The rank to blame. torchrun notes whole seconds, and a rank that was killed takes others with it within one: they fail
    of the lost connection (1), or are ended by torchrun itself (SIGTERM)."""
    began = min(failure.timestamp for failure in failures.values())
    early = {rank: failure for rank, failure in failures.items() if failure.timestamp <= began + 1}

    def innocence(item: tuple[int, ProcessFailure]) -> tuple[bool, bool, bool, int, int]:
        rank, failure = item
        code = failure.exitcode
        return code == -signal.SIGTERM, code >= 0, code == Status.FAILED, failure.timestamp, rank

    return min(early.items(), key=innocence)


def say(sentence: str) -> None:
    """Show a sentence; a screen that is gone ends nothing."""
    with suppress(OSError):
        print(f"tiglon: {sentence}", file=sys.stderr, flush=True)


class _Signals:
    """While ranks run: the first stop signal is handed on to them by torchrun, a second Ctrl-C ends them at once."""

    def __init__(self, found: _Found) -> None:
        self._found = found
        self._heard_at = 0.0
        self._before: dict[int, Any] = {}
        self.over = False

    def __enter__(self) -> Self:
        for number in SIGNALS:
            if not (number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN):
                self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.over:
            return
        if not self._heard_at:
            self._heard_at = time.monotonic()
            raise SignalException("", sigval=signal.Signals(number))
        if number in IMPATIENT and time.monotonic() - self._heard_at > ECHO_SECONDS:
            end_ranks()
            if self._found.stopped():  # it was saved just before
                os._exit(Status.STOPPED)
            if self._found.finished():
                os._exit(Status.DONE)
            say(f"left at once by a second {signal.Signals(number).name}")
            os._exit(Status.INTERRUPTED)


def end_ranks() -> None:
    """Kill what is left of the ranks, each with all that it started: torchrun gives every rank a session of its own."""
    for child in psutil.Process().children():
        with suppress(ProcessLookupError, PermissionError):
            if os.getpgid(child.pid) == child.pid:
                os.killpg(child.pid, signal.SIGKILL)
