"""Asynchronous read-back: scalars of one step that are read while the next one runs."""

from typing import Any

import torch
from torch import Tensor


class AsyncRead:
    """Copies 0-dim tensors of one device to the host asynchronously.

    `item()` on a GPU waits for everything queued before the call, the step in progress included. Here the copy is queued by the
    constructor, and `read` waits for that copy alone.

    Args:
        work: of the asynchronous collective that makes the values, if there is one.
    """

    def __init__(self, *values: Tensor, work: Any = None):
        self._values, self._work, self._copied = list(values), work, None
        if values[0].is_cuda:
            if work is not None:
                work.wait()  # the stream waits, the host does not
            packed = torch.stack([value.detach().double() for value in values])
            self._values, self._work = list(packed.to("cpu", non_blocking=True).unbind()), None  # into pinned memory
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> list[float]:
        """The values, in order."""
        if self._work is not None:
            self._work.wait()
        if self._copied is not None:
            self._copied.synchronize()
        return [float(value) for value in self._values]
