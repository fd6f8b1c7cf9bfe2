"""Whole runs in test processes, with a fault at a chosen step of a chosen rank. (No test itself.)"""

import errno
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import launch.runtime
import trainer.engines.fold
import trainer.engines.zero
import trainer.evaluate
from launch.train import main
from tests.ranks import run_ranks
from trainer.checkpoint import writer
from trainer.engines.fold import Fold
from trainer.engines.zero import Zero
from trainer.session import Session


@dataclass(frozen=True)
class Fault:
    """Something that happens once, in one process."""

    what: str
    """The name of a signal, "nan" (a gradient), "spike" (of the loss), "flip" (a bit of a weight); "stop-after-rewind" (SIGTERM
    after the first rewind, whatever the step); from then on:
    "slow" (every micro-batch), "slow-save", "slow-look" (every batch of an evaluation), "full-disk" (every save)."""
    step: int
    """Updates done when it happens."""
    rank: int | None = 0
    """None = every rank."""
    delay_seconds: float = 0.0
    """Of a signal, after that step began; how much longer a slow thing takes."""


def run_main(world_size: int, folder: Path, arguments: list[str], *faults: Fault) -> tuple[list[int], str]:
    """`launch.train` on ranks of this computer: their exit statuses and what they put on the screen.

    Forked from the tests' fork server, so a run pays no imports.
    """
    folder.mkdir(parents=True, exist_ok=True)
    screens = [folder / f"screen-{rank}" for rank in range(world_size)]
    for screen in screens:
        screen.write_text("")
    statuses = run_ranks(_rank, world_size, str(folder), uuid.uuid4().hex, arguments, faults, timeout_seconds=240)
    return statuses, "".join(screen.read_text() for screen in screens)


def seconds_to_leave(folder: Path) -> float:
    """From the last run's signal to the end of its last rank."""
    return max(float(left.read_text()) for left in folder.glob("left-*")) - float((folder / "signal").read_text())


def _rank(rank: int, world_size: int, folder: str, token: str, arguments: list[str], faults: tuple[Fault, ...]) -> int:
    """What torchrun does for a rank: the environment, and a place to meet (a file: no ports)."""
    dist.barrier()  # a rank that left before the others have met would look dead to them
    dist.destroy_process_group()
    os.dup2(os.open(f"{folder}/screen-{rank}", os.O_WRONLY | os.O_APPEND), 2)
    sizes = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size}
    sizes["LOCAL_WORLD_SIZE"] = world_size
    os.environ.update({name: str(value) for name, value in sizes.items()})
    os.environ.update({"MASTER_ADDR": "localhost", "MASTER_PORT": "1"})  # as torchrun would; not used
    launch.runtime.cores = lambda: 1  # one thread a rank: threads that spin starve others
    init = dist.init_process_group

    def meet(backend: str, meeting: str = "run", **options: Any) -> None:
        init(backend, init_method=f"file://{folder}/{token}-{meeting}", rank=rank, world_size=world_size, **options)

    dist.init_process_group = meet
    for fault in faults:
        if fault.rank in (None, rank):
            inject(fault, Path(folder))
    status = main(arguments)
    Path(f"{folder}/left-{rank}").write_text(repr(time.monotonic()))
    meet("gloo", "end")
    return status


def inject(fault: Fault, folder: Path) -> None:
    """Arrange for the fault in this process; the time of a signal is written to `folder`."""
    match fault.what:
        case "flip":
            _when_step_begins(fault.step, _flip)
        case "nan":
            _around_accumulate(fault.step, _spoil)
        case "spike":
            _around_accumulate(fault.step, lambda engine, accumulate: accumulate() + 100.0)
        case "slow":
            _when_step_begins(
                fault.step, lambda run: _slow_down(fault.delay_seconds, "on_device", trainer.engines.fold, trainer.engines.zero)
            )
        case "slow-save":
            _when_step_begins(fault.step, lambda run: _slow_down(fault.delay_seconds, "write_tensors", writer))
        case "slow-look":
            _when_step_begins(fault.step, lambda run: _slow_down(fault.delay_seconds, "on_device", trainer.evaluate))
        case "stop-after-rewind":
            _after_rewind(lambda: os.kill(os.getpid(), signal.SIGTERM))
        case "full-disk":
            writer.RETRY_SECONDS = 0.1
            _when_step_begins(fault.step, lambda run: setattr(writer, "write_tensors", _no_room))
        case name:
            number = signal.Signals[name]

            def kill() -> None:
                (folder / "signal").write_text(repr(time.monotonic()))
                os.kill(os.getpid(), number)

            _when_step_begins(fault.step, lambda run: threading.Timer(fault.delay_seconds, kill).start())


def _no_room(*args: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _when_step_begins(step: int, act: Callable[[Session], Any]) -> None:
    rate = Session.learning_rate

    def learning_rate(self: Session, state: Any) -> float:
        if state.step == step:
            act(self)
        return rate(self, state)

    Session.learning_rate = learning_rate


def _after_rewind(act: Callable[[], Any]) -> None:
    rewind = Session._rewind

    def both(self: Session, *arguments: Any) -> Any:
        state = rewind(self, *arguments)
        act()
        time.sleep(0.2)  # signals are heard by a thread
        return state

    Session._rewind = both


def _around_accumulate(step: int, act: Callable[[Any, Callable[[], Tensor]], Tensor]) -> None:
    """The step is counted from the start of the process here."""
    calls = [0]
    for engine in (Zero, Fold):
        plain = engine.accumulate

        def accumulate(self: Any, batches: list, plain: Callable = plain) -> Tensor:
            calls[0] += 1
            return act(self, lambda: plain(self, batches)) if calls[0] == step + 1 else plain(self, batches)

        engine.accumulate = accumulate


def _slow_down(seconds: float, name: str, *modules: Any) -> None:
    for module in modules:
        plain = getattr(module, name)

        def slow(*args: Any, plain: Callable = plain, **options: Any) -> Any:
            time.sleep(seconds)
            return plain(*args, **options)

        setattr(module, name, slow)


def _flip(run: Session) -> None:
    weight = dict(run.engine.model.named_parameters())["model.norm.weight"]
    weight.data.view(torch.uint8)[3] ^= 1


def _spoil(engine: Any, accumulate: Callable[[], Tensor]) -> Tensor:
    weight = dict(engine.model.named_parameters())["model.layers.0.mlp.up_proj.weight"]
    hook = weight.register_hook(lambda gradient: gradient * torch.nan)
    loss = accumulate()
    hook.remove()
    return loss
