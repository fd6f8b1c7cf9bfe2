"""Averages flat tensors over ranks in buckets, while the backward still runs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from model.parallel.mesh import Axis
from trainer.optimizers.norms import at_least_float32

IN_FLIGHT = 2
"""Buckets in flight: one is sent while the next is filled; each costs 4 bytes per element."""


def bucket_indexes(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Indexes of tensors of these sizes, in order, in buckets of at most `limit` elements; a larger tensor has its own."""
    buckets: list[list[int]] = []
    free = 0
    for index, size in enumerate(sizes):
        if size > free:
            buckets.append([])
            free = limit
        buckets[-1].append(index)
        free -= size
    return buckets


class Buckets:
    """Tensors in the order in which the backward finishes them, cut into buckets.

    A bucket is sent when all of its tensors are ready and the bucket before it has been sent, so that every rank sends
    the same ones in the same order. It is sent as float32: a bfloat16 mean would lose what each rank added.

    Args:
        sizes: elements of each tensor, by key, in the order in which they are expected.
        axis: ranks to average over.
        limit: elements in a bucket; a larger tensor has one to itself.
        write: called with a key and its mean (float32 or float64), which it may destroy.
    """

    def __init__(self, sizes: Mapping[Any, int], axis: Axis, limit: int, write: Callable[[Any, Tensor], None]):
        self.sizes, self.axis, self.write = sizes, axis, write
        names = list(sizes)
        self.members = [[names[index] for index in bucket] for bucket in bucket_indexes([*sizes.values()], limit)]
        self.ready: dict[Any, Tensor] = {}
        self.sent: list[tuple[Any, Tensor, list[Any]]] = []
        self.next = 0

    def done(self, key: Any, tensor: Tensor) -> None:
        """A flat tensor, to which this rank will add nothing more in this round."""
        if self.axis.group is None:
            return
        self.ready[key] = tensor
        while self.next < len(self.members) and self.ready.keys() >= set(self.members[self.next]):
            self._send(self.members[self.next])
            self.next += 1

    def finish(self) -> None:
        """Wait until all that is done has been written, and reset for the next round."""
        while self.sent:
            self._receive()
        self.ready.clear()
        self.next = 0

    def _send(self, names: list[Any]) -> None:
        if len(self.sent) == IN_FLIGHT:
            self._receive()
        flat = [self.ready[name] for name in names]
        buffer = flat[0].new_empty(sum(tensor.numel() for tensor in flat), dtype=at_least_float32(flat[0][:0]).dtype)
        for tensor, part in zip(flat, buffer.split([tensor.numel() for tensor in flat]), strict=True):
            part.copy_(tensor)  # float32 copies and their concatenation would need the bucket twice
        for name in names:
            del self.ready[name]
        self.sent.append((dist.all_reduce(buffer, group=self.axis.group, async_op=True), buffer, names))

    def _receive(self) -> None:
        work, buffer, names = self.sent.pop(0)
        work.wait()
        buffer.div_(self.axis.size)
        for name, mean in zip(names, buffer.split([self.sizes[name] for name in names]), strict=True):
            self.write(name, mean)
