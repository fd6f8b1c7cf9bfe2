"""Numbers of a step that are read while the next one runs."""

from typing import Any

import torch
from torch import Tensor


class Late:
    """A few 0-dim tensors of one device on their way to the host.

    `item()` on a GPU waits for everything queued before the call, the step in progress included. Here the copy is queued
    at once, and `read` waits for that copy alone.
    """

    def __init__(self, *values: Tensor, work: Any = None):
        """`work` is a collective, if one is still making the values."""
        self._values, self._work, self._copied = list(values), work, None
        if values[0].is_cuda:
            if work is not None:
                work.wait()  # the stream waits, the host goes on
            packed = torch.stack([value.detach().double() for value in values])
            self._values, self._work = list(packed.to("cpu", non_blocking=True).unbind()), None  # into pinned memory
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> list[float]:
        """The numbers."""
        if self._work is not None:
            self._work.wait()
        if self._copied is not None:
            self._copied.synchronize()
        return [float(value) for value in self._values]
