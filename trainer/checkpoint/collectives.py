"""Python objects between the ranks that save together."""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

_TIMEOUT = timedelta(hours=4)
"""Of the slowest save: ranks that have written wait here for those that still write."""


class ObjectCollectives:
    """Collectives over a gloo group of its own, so that a thread that saves never meets the collectives of training.

    Every method is called by all ranks together.

    Args:
        group: the ranks; None for one process alone.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._ranks = dist.get_process_group_ranks(group) if group is not None else [0]
        self._group: Any = dist.new_group(self._ranks, backend="gloo", timeout=_TIMEOUT) if len(self._ranks) > 1 else None
        self.rank = dist.get_rank(group) if group is not None else 0
        self.world_size = len(self._ranks)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self._group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=self._ranks[0], group=self._group, device=torch.device("cpu"))
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on rank 0; an empty list elsewhere."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.world_size if self.rank == 0 else []
        dist.gather_object(value, values if self.rank == 0 else None, dst=self._ranks[0], group=self._group)
        return values

    def all_gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values
