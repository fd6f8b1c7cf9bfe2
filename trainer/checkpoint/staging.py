"""The copy of a rank's state in host memory, taken beside training, from which a checkpoint is written.

Weights change in an update only, and so does most state: their copy may run during the next step's forwards and backwards, as
long as it is finished before the update. What backwards change is copied first, during the first forward.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from threading import Event, Thread

import torch

from trainer.checkpoint.format import StagedTensor
from trainer.checkpoint.pinned_memory import huge_pages, pin, unpin
from trainer.checkpoint.rectangles import StepPart

_HEARTBEAT_SECONDS = 0.2
_TOUCHED_AT_ONCE = 64 << 20
"""Bytes of fresh memory written to before it is asked whether they are still wanted."""


class Staging:
    """Host memory for one state, kept from save to save.

    `begin` is called where the state was last changed, `copy` by the thread that writes, `wait` by training.
    """

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._pinned = False
        self._gpu: torch.device | None = None
        self._ready: torch.cuda.Event | None = None
        self._copied: dict[StepPart, Event] = {"accumulate": Event(), "update": Event()}
        self.give_up()
        self._reserving: Thread | None = None
        self._closed = Event()

    def reserve(self, tensors: list[StagedTensor]) -> None:
        """Allocate the memory for these tensors in a thread: fresh or pinned, it costs seconds, and a first save would wait.

        Where there is not enough, the first save says so.
        """
        self._gpu = _gpu(tensors)
        self._reserving = Thread(target=self._reserve, args=(tensors,), name="checkpoint memory", daemon=True)
        self._reserving.start()

    def _reserve(self, tensors: list[StagedTensor]) -> None:
        with suppress(RuntimeError, OSError, MemoryError):
            self._select_gpu()
            self._allocate(tensors)
            for fresh in () if self._pinned else self._buffer.split(_TOUCHED_AT_ONCE):
                if self._closed.is_set():
                    return
                fresh.zero_()  # the system gives memory where it is written to

    def close(self) -> None:
        """Reserve no more. A thread that is inside torch while Python ends would abort the process."""
        self._closed.set()
        if self._reserving is not None:
            self._reserving.join()

    def begin(self, tensors: list[StagedTensor]) -> None:
        """The state is as it is to be saved once the work that the GPU was given so far is done."""
        for copied in self._copied.values():
            copied.clear()
        self._gpu = _gpu(tensors)
        if self._gpu is not None:
            self._ready = torch.cuda.Event()
            self._ready.record(torch.cuda.current_stream(self._gpu))

    def wait(self, before: StepPart, heartbeat: Callable[[], None]) -> bool:
        """Return when what that part of a step changes has been copied, or could not be; whether that took waiting."""
        copied = self._copied[before]
        waited = not copied.is_set()
        while not copied.wait(_HEARTBEAT_SECONDS):
            heartbeat()
        return waited

    def give_up(self) -> None:
        """Nothing is copied any more: training waits no longer."""
        for copied in self._copied.values():
            copied.set()

    def copy(self, tensors: list[StagedTensor]) -> list[StagedTensor]:
        """The same tensors with their values in host memory.

        Raises:
            RuntimeError, OSError, MemoryError: there is not enough of it.
        """
        try:
            copies = [replace(tensor, values=target) for tensor, target in zip(tensors, self._targets(tensors), strict=True)]
            for part, copied in self._copied.items():
                self._copy([(t.values, c.values) for t, c in zip(tensors, copies, strict=True) if t.changes_in == part])
                copied.set()
            return copies
        finally:
            self.give_up()

    def _copy(self, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Copy (source, target) pairs; from a GPU on a stream beside that of training."""
        if self._gpu is None or self._ready is None:
            for source, target in pairs:
                target.copy_(source)
            return
        stream = torch.cuda.Stream(self._gpu)
        with torch.cuda.stream(stream):
            self._ready.wait()
            for source, target in pairs:
                target.copy_(source, non_blocking=True)
        stream.synchronize()

    def _targets(self, tensors: list[StagedTensor]) -> list[torch.Tensor]:
        """Host memory for every tensor, in their order; pinned where the values are on a GPU."""
        if self._reserving is not None:
            self._reserving.join()
        self._select_gpu()
        self._allocate(tensors)
        targets, offset = [], 0
        for tensor in tensors:
            targets.append(self._buffer[offset : offset + tensor.nbytes].view(tensor.values.dtype))
            offset += tensor.nbytes
        return targets

    def _allocate(self, tensors: list[StagedTensor]) -> None:
        """Have a buffer of the tensors' size."""
        total = sum(tensor.nbytes for tensor in tensors)
        if self._buffer.numel() != total:
            self._release()  # the old one goes before the new one comes
            self._buffer = huge_pages(total)
            self._pinned = self._gpu is not None and pin(self._buffer, self._gpu)

    def _select_gpu(self) -> None:
        """A thread begins on the first GPU, and pinning from there would take memory of it for every rank."""
        if self._gpu is not None:
            torch.cuda.set_device(self._gpu)

    def _release(self) -> None:
        if self._pinned:
            unpin(self._buffer)
        self._buffer, self._pinned = torch.empty(0, dtype=torch.uint8), False


def _gpu(tensors: list[StagedTensor]) -> torch.device | None:
    return next((tensor.values.device for tensor in tensors if tensor.values.is_cuda), None)
