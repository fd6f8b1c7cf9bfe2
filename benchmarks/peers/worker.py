"""What every trainer under test shares: the job, its random tokens, and the orders it takes on stdin.

Runs in the environments of the peers too, so it needs torch alone. A worker says that it is ready, then for each number N
on stdin trains N steps and answers with one line of JSON; between orders it sleeps in a read.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BATCHES = 8
"""Different batches, taken in turn."""


@dataclass(frozen=True)
class Job:
    """The same for every trainer, but for `options`."""

    model: dict[str, Any]
    """Sizes by their Hugging Face names."""
    length: int
    """Tokens of a sequence."""
    batch: int
    """Sequences a step and rank."""
    device: str
    learning_rate: float
    options: dict[str, Any]
    """What this trainer is asked to do its own way: compile, engine, recompute ..."""

    @property
    def compiled(self) -> bool:
        return bool(self.options.get("compile"))

    @property
    def recomputed(self) -> bool:
        return self.options.get("recompute", "none") != "none"


class Orders:
    """The worker's end of the conversation. Whatever else the process prints goes to stderr."""

    def __init__(self) -> None:
        self.job = Job(**json.loads(sys.argv[1]))
        self._answers = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self._left, self._asked, self._begin, self._cpu_begin = 0, 0, 0.0, 0.0
        self.device = torch.device(self.job.device, 0) if self.job.device == "cuda" else torch.device("cpu")
        seed = 7 + int(os.environ.get("RANK", "0"))
        generator = torch.Generator().manual_seed(seed)
        shape = (BATCHES, self.job.batch, self.job.length + 1)
        self._host_ids = torch.randint(self.job.model["vocab_size"], shape, generator=generator)
        self._ids = self._host_ids.to(self.device)
        self._next = 0

    def batch(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the next step, [batch, length] each, on the device."""
        return self._take(self._ids)

    def host_batch(self) -> tuple[Tensor, Tensor]:
        """The same on the CPU, for a trainer that sends them to the device itself."""
        return self._take(self._host_ids)

    def _take(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        chosen = ids[self._next % BATCHES]
        self._next += 1
        return chosen[:, :-1].contiguous(), chosen[:, 1:].contiguous()

    def ready(self) -> None:
        """Everything is built: say so and wait for the first order."""
        self._say({"ready": True})
        self._wait()

    def after_step(self, loss: Tensor | float) -> None:
        """A step is done (perhaps only queued on the device): answer if it was the last of an order."""
        self._left -= 1
        if self._left:
            return
        value = float(loss)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._begin
        used = {"seconds": seconds, "cpu_seconds": time.process_time() - self._cpu_begin, "memory_bytes": self._memory_bytes()}
        self._say(used | {"steps": self._asked, "loss": value})
        self._wait()

    def failed(self, error: BaseException) -> None:
        """Why this trainer does not run here."""
        self._say({"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]})

    def _wait(self) -> None:
        line = sys.stdin.readline()
        if not line.strip() or line.strip() == "0":
            self._answers.flush()
            os._exit(0)  # a Trainer that owns its loop would continue
        self._left = self._asked = int(line)
        self._begin, self._cpu_begin = time.perf_counter(), time.process_time()

    def _say(self, answer: dict[str, Any]) -> None:
        self._answers.write(json.dumps(answer) + "\n")

    def _memory_bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def serve(train: Callable[[Orders], None]) -> None:
    """Run `train`, which builds, calls `ready` and steps for ever; say why if it cannot."""
    orders = Orders()
    try:
        train(orders)
    except BaseException as error:
        orders.failed(error)
        raise


def step_for_ever(orders: Orders, step: Callable[[Tensor, Tensor], Tensor]) -> None:
    """The loop of a trainer that has none of its own; `step` takes inputs and targets and gives the loss."""
    orders.ready()
    while True:
        orders.after_step(step(*orders.batch()))
