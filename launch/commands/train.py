"""`tiglon train`: one rank in this process, or several with torchrun inside it, so that a signal to it reaches the ranks,
its last message says how they ended, and none of them outlives it. Each rank runs launch/train.py."""

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

import typer

from data.storage import join_address, open_store
from launch import runtime
from launch.checkpoints import read_meta
from launch.commands.torchrun import Failures, ProcessFailure, SignalException, forward_signal, kill_ranks, run_torchrun
from launch.config import RunConfig
from launch.exit_status import Status, was_stopped
from launch.inputs import open_data
from launch.interrupts import interrupts_end_at_once, send_again
from launch.load_config import load_config
from launch.preflight import begin_run, check_start, checkpoint_address
from launch.resume import read_lineage
from launch.run_end import BEFORE_TRAINING, first_failure
from launch.train import main as train_main
from trainer.checkpoint.directory import directory_name, saved_steps
from trainer.checkpoint.lineage import Lineage, lineage_from, lineage_of
from trainer.monitoring.signals import ECHO_SECONDS, IMPATIENT, SIGNALS


def train_command(
    config: Annotated[str, typer.Argument(help="TOML file, or a shipped one's name.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value ...")] = None,
    nproc: Annotated[int, typer.Option(help="Ranks on this computer; more than one are started by torchrun.")] = 1,
    max_restarts: Annotated[int, typer.Option(help="Restarts of the ranks after a failure; they resume.")] = 0,
) -> None:
    """Train, or resume training.

    Exit status: 0 all steps are done and saved, 85 stopped by a signal and saved, 2 a mistake, else a failure.

    Example: tiglon train quickstart --nproc 2 train.steps=100
    """
    arguments = [config, *(overrides or [])]
    if nproc == 1 and not max_restarts:
        raise typer.Exit(train_main(arguments))
    with interrupts_end_at_once(BEFORE_TRAINING):
        checked = _checked_config(load_config(config, overrides or [], settled=False), nproc)
    raise typer.Exit(run_ranks(nproc, max_restarts, checked, arguments))


def _checked_config(requested: RunConfig, ranks: int) -> RunConfig:
    """What the ranks will train with; checked before any starts, so that a mistake is one sentence from one process."""
    first = runtime.World(rank=0, local_rank=0, world_size=ranks, local_world_size=ranks, restarts=0, launched=False)
    begun = begin_run(requested, first)
    data = open_data(begun.config, 0, ranks, begun=begun.state)
    check_start(begun, first, runtime.choose_device(begun.config.run.device, first), data.train)
    data.close()
    return begun.config


def run_ranks(ranks: int, max_restarts: int, config: RunConfig, arguments: list[str]) -> int:
    """Run `tiglon train` with `arguments` on `ranks` ranks.

    Returns:
        The exit status (launch/exit_status.py); 128 + the signal's number where one killed a rank, or ended the run before
        it was saved.

    Raises:
        ValueError: max_restarts is negative.
    """
    if max_restarts < 0:
        raise ValueError(f"--max-restarts must be at least 0, got {max_restarts}")
    runtime.set_environment({**runtime.rank_environment(ranks, config.health.grace_seconds), **runtime.launcher()})
    launch = uuid.uuid4().hex
    options = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", f"--rdzv-id={launch}"]  # as --standalone, with a name
    options += [f"--nproc-per-node={ranks}", f"--max-restarts={max_restarts}", "-m", "launch", "train", *arguments]
    records = _LaunchRecords(config, launch)
    with _SignalHandlers(records) as handlers:
        try:
            ended = run_torchrun(options, _tell_ranks)
        finally:
            handlers.finished = True
            kill_ranks()
        if isinstance(ended, signal.Signals):
            return _status_after_signal(records, ended)
        if ended is not None:
            return _status_after_failure(records, ended)
    return Status.STOPPED if records.stopped() or 0 < records.newest()[0] < config.train.steps else Status.DONE


@dataclass(frozen=True)
class _LaunchRecords:
    """What the ranks of this launch have left in their run directory; records of earlier launches there do not count."""

    config: RunConfig
    launch: str

    def lineage(self) -> Lineage | None:
        """The lineage that the ranks have begun; None if they failed before."""
        recorded = read_lineage(self.config.run.dir)
        return lineage_from(recorded) if recorded and recorded.get("launch") == self.launch else None

    def stopped(self) -> bool:
        return self.lineage() is not None and was_stopped(self.config.run.dir)

    def finished(self) -> bool:
        return self.newest()[0] >= self.config.train.steps

    def failed(self) -> bool:
        """Whether a rank has failed and said why."""
        return self.lineage() is not None and first_failure(Path(self.config.run.dir)) != ""

    def newest(self) -> tuple[int, str]:
        """Step and path of the newest complete checkpoint of the run; (0, "") if there is none."""
        lineage, address = self.lineage(), checkpoint_address(self.config)
        with suppress(OSError, ValueError):
            for step in reversed(saved_steps(open_store(address)) if lineage else []):
                path = join_address(address, directory_name(step))
                if lineage_of(read_meta(path).extra) == lineage:
                    return step, path
        return 0, ""

    def saved(self) -> str:
        """What of the run is saved, as the end of a sentence."""
        if self.lineage() is None:
            return "training had not begun"
        _, path = self.newest()
        return f"the newest complete checkpoint is {path}" if path else "there is no complete checkpoint of this run"


def _status_after_signal(records: _LaunchRecords, number: signal.Signals) -> int:
    """The ranks have saved and left, or had just finished or failed, or their grace period ended first."""
    if records.stopped():
        return Status.STOPPED
    if records.failed():
        return Status.FAILED
    if records.finished():
        return Status.DONE
    _print_error(f"ended by {number.name} before the run was saved; {records.saved()}")
    return 128 + number


def _status_after_failure(records: _LaunchRecords, failures: Failures) -> int:
    """A rank failed and torchrun has ended the others. Say why where the rank could not."""
    rank, failure = _root_cause(failures)
    log = Path(records.config.run.dir) / "logs" / f"rank-{rank}.log"
    see_log = f"; log: {log}" if log.exists() else ""
    if failure.exitcode > 0:
        if failure.exitcode == Status.FAILED and records.lineage() and not records.failed():
            _print_error(f"rank {rank} ended with status {failure.exitcode} and could not say why; {records.saved()}{see_log}")
        return failure.exitcode
    name = _signal_name(failure)
    guess = "; out of memory? (dmesg tells)" if name == "SIGKILL" else ""
    _print_error(f"rank {rank} was killed ({name}){guess}; {records.saved()}{see_log}")
    return 128 - failure.exitcode


def _tell_ranks(failures: Failures) -> None:
    """Let ranks that are started again know which one was killed: the others know no more than that they lost it."""
    rank, failure = _root_cause(failures)
    killed = failure.exitcode < 0
    runtime.set_environment({runtime.LOST: f"rank {rank} was killed ({_signal_name(failure)})" if killed else ""})


def _signal_name(failure: ProcessFailure) -> str:
    return signal.Signals(-failure.exitcode).name


def _root_cause(failures: Failures) -> tuple[int, ProcessFailure]:
    """The rank that failed first, as far as can be told.

    torchrun's timestamps are whole seconds, and a rank that was killed takes others with it within one: they fail of the
    lost connection (status 1), or torchrun ends them (SIGTERM).
    """
    began = min(failure.timestamp for failure in failures.values())
    early = {rank: failure for rank, failure in failures.items() if failure.timestamp <= began + 1}

    def consequence(item: tuple[int, ProcessFailure]) -> tuple[bool, bool, bool, int, int]:
        """Sorts a rank the later, the more its end looks like a consequence of another's."""
        rank, failure = item
        code = failure.exitcode
        return code == -signal.SIGTERM, code >= 0, code == Status.FAILED, failure.timestamp, rank

    return min(early.items(), key=consequence)


def _print_error(sentence: str) -> None:
    """Print a sentence to stderr; a closed stderr is ignored."""
    with suppress(OSError):
        print(f"tiglon: {sentence}", file=sys.stderr, flush=True)


class _SignalHandlers:
    """While ranks run: torchrun forwards the first stop signal to them, a second Ctrl-C kills them at once."""

    def __init__(self, records: _LaunchRecords) -> None:
        self._records = records
        self._first_at = 0.0
        self._previous: dict[int, Any] = {}
        self.finished = False
        """The ranks have ended: signals are ignored from here on, so that the exit status is that of the run."""

    def __enter__(self) -> Self:
        for number in SIGNALS:
            if not (number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN):  # nohup
                self._previous[number] = signal.signal(number, self._handle)
        self._shown, sys.unraisablehook = sys.unraisablehook, self._unraisable
        return self

    def __exit__(self, *_: object) -> None:
        sys.unraisablehook = self._shown
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _unraisable(self, unraisable: Any) -> None:
        if isinstance(unraisable.exc_value, SignalException):  # which torchrun did not get
            self._first_at = 0.0
            send_again(unraisable.exc_value.sigval)
        else:
            self._shown(unraisable)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.finished:
            return
        if not self._first_at:
            self._first_at = time.monotonic()
            forward_signal(number)
        if number in IMPATIENT and time.monotonic() - self._first_at > ECHO_SECONDS:
            kill_ranks()
            if self._records.stopped():  # it was saved just before
                os._exit(Status.STOPPED)
            if self._records.finished():
                os._exit(Status.DONE)
            _print_error(f"left at once by a second {signal.Signals(number).name}")
            os._exit(Status.INTERRUPTED)
