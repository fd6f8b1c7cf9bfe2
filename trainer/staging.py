"""The copy of a rank's state in host memory, taken beside training, from which a checkpoint is written.

Weights change in an update only, and so does most state: their copy may go on beside the next step's forwards and
backwards, as long as it is whole before the update. What backwards change is copied first, beside the first forward.
"""

import logging
import mmap
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from threading import Event, Thread

import torch
from torch.cuda._pin_memory_utils import pin_memory, unpin_memory

from trainer.tensorfile import Piece

log = logging.getLogger(__name__)

_BEAT_SECONDS = 0.2


class Staging:
    """Host memory for one state, kept from save to save.

    `begin` is called where the state was last changed, `copy` by the thread that writes, the waits by training.
    """

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._pinned = False
        self._gpu: torch.device | None = None
        self._ready: torch.cuda.Event | None = None
        self._moving_done, self._done = Event(), Event()
        self._moving_done.set()
        self._done.set()
        self._reserving: Thread | None = None

    def reserve(self, found: list[Piece]) -> None:
        """Take the memory for these pieces beside training: fresh or pinned, it costs seconds, and a first save would wait.

        Where there is no room, the first save says so.
        """
        self._gpu = _gpu(found)
        self._reserving = Thread(target=self._reserve, args=(found,), name="checkpoint memory", daemon=True)
        self._reserving.start()

    def _reserve(self, found: list[Piece]) -> None:
        with suppress(RuntimeError, OSError, MemoryError):
            self._stand_on_gpu()
            self._room(found)
            if not self._pinned:
                self._buffer.zero_()  # the system gives memory where it is written to

    def begin(self, found: list[Piece]) -> None:
        """The state is as it is to be saved, once what the GPU was given so far is done."""
        self._moving_done.clear()
        self._done.clear()
        self._gpu = _gpu(found)
        if self._gpu is not None:
            self._ready = torch.cuda.Event()
            self._ready.record(torch.cuda.current_stream(self._gpu))

    def wait(self, all_of_it: bool = True, beat: Callable[[], None] = lambda: None) -> bool:
        """Return when everything (or all that is not steady) has been copied, or could not be; whether that took waiting."""
        event = self._done if all_of_it else self._moving_done
        late = not event.is_set()
        while not event.wait(_BEAT_SECONDS):
            beat()
        return late

    def give_up(self) -> None:
        """Nobody copies any more: training waits for nothing."""
        self._moving_done.set()
        self._done.set()

    def copy(self, found: list[Piece]) -> list[Piece]:
        """The same pieces with their values in host memory.

        Raises:
            RuntimeError, OSError, MemoryError: there is no room for them.
        """
        try:
            places = self._places(found)
            pairs = [(piece.values, place) for piece, place in zip(found, places, strict=True)]
            self._copy([pair for pair, piece in zip(pairs, found, strict=True) if not piece.steady])
            self._moving_done.set()
            self._copy([pair for pair, piece in zip(pairs, found, strict=True) if piece.steady])
            return [replace(piece, values=place) for piece, place in zip(found, places, strict=True)]
        finally:
            self.give_up()

    def _copy(self, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Each first tensor into the second; from a GPU on a stream beside that of training."""
        if self._gpu is None or self._ready is None:
            for values, place in pairs:
                place.copy_(values)
            return
        stream = torch.cuda.Stream(self._gpu)
        with torch.cuda.stream(stream):
            self._ready.wait()
            for values, place in pairs:
                place.copy_(values, non_blocking=True)
        stream.synchronize()

    def _places(self, found: list[Piece]) -> list[torch.Tensor]:
        """Room for every piece, in their order; pinned where the values lie on a GPU."""
        if self._reserving is not None:
            self._reserving.join()
        self._stand_on_gpu()
        self._room(found)
        places, begin = [], 0
        for piece in found:
            places.append(self._buffer[begin : begin + piece.nbytes].view(piece.values.dtype))
            begin += piece.nbytes
        return places

    def _room(self, found: list[Piece]) -> None:
        """A buffer of the pieces' size."""
        total = sum(piece.nbytes for piece in found)
        if self._buffer.numel() != total:
            self._release()  # the old one goes before the new one comes
            self._buffer = _huge_pages(total)
            if self._gpu is not None:
                self._pinned = _pin(self._buffer, self._gpu)

    def _stand_on_gpu(self) -> None:
        """A thread begins on the first GPU, and pinning from there would take memory of it for every rank."""
        if self._gpu is not None:
            torch.cuda.set_device(self._gpu)

    def _release(self) -> None:
        if self._pinned:
            unpin_memory(self._buffer.data_ptr())
        self._buffer, self._pinned = torch.empty(0, dtype=torch.uint8), False


def _gpu(found: list[Piece]) -> torch.device | None:
    return next((piece.values.device for piece in found if piece.values.is_cuda), None)


def _pin(buffer: torch.Tensor, gpu: torch.device) -> bool:
    """Have the GPU write to a buffer directly; whether it can.

    torch's own pinned memory comes in powers of two: 128 GiB for a state of 66.
    """
    if not buffer.numel():
        return False
    try:
        pin_memory(buffer.data_ptr(), buffer.numel())
    except (RuntimeError, AssertionError) as error:  # a limit on locked memory, mostly
        log.warning("%.1f GB for checkpoints cannot be pinned, so copies take longer: %s", buffer.numel() / 1e9, error)
        with suppress(RuntimeError, AssertionError):  # CUDA tells a failed call once more, to whoever asks next
            torch.zeros(1, device=gpu)
        return False
    return True


def _huge_pages(size: int) -> torch.Tensor:
    """Fresh memory in pages of 2 MiB: with those of 4 KiB most of the first copy would go into page faults."""
    if not size:
        return torch.empty(0, dtype=torch.uint8)
    memory = mmap.mmap(-1, size)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
