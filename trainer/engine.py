"""What the loop asks of an engine. Two answer: `zero` (DeepSpeed) and `fold`."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from model.parallel import Topology
from trainer.checkpoint import Shard
from trainer.clock import Clock
from trainer.fragments import Fragment
from trainer.optimizer import Update


class Batch(Protocol):
    """One micro-batch of one data-parallel rank; data/stream.py makes them."""

    @property
    def inputs_BS(self) -> Tensor: ...  # noqa: N802
    @property
    def targets_BS(self) -> Tensor: ...  # noqa: N802
    @property
    def cu_seqlens(self) -> Tensor | None: ...


class Engine(Protocol):
    """Gradients and updates, however ranks hold weights, gradients and optimizer state."""

    model: Any
    """The decoder, whose weights every rank may read between updates (through its forward under ZeRO 3)."""
    clock: Clock
    """Marked after each forward and backward."""

    def accumulate(self, batches: Sequence[Batch]) -> Tensor | None:
        """Gradients of one update's micro-batches; mean loss in nats a target over all ranks (0-dim, on device).

        None: the engine was asked to leave between two micro-batches; weights and optimizer state are as before.
        """
        ...

    def update(self, learning_rate: float, skip: bool = False) -> Update:
        """Move the weights; with `skip` leave them alone and drop the gradients."""
        ...

    def fragments(self) -> list[Fragment]:
        """What this rank holds of every parameter."""
        ...

    def shards(self) -> list[Shard]:
        """Weights and optimizer state, for saving and loading."""
        ...

    def loaded(self, step: int) -> None:
        """Take over what a checkpoint of that step wrote into the shards."""
        ...

    def close(self) -> None:
        """Let go of hooks and buffers."""
        ...


def count_targets(batches: Sequence[Batch], topology: Topology) -> Tensor:
    """Targets scored in an update over all data-parallel ranks: float32, 0-dim, on the device, which is not waited for."""
    mine = torch.stack([(batch.targets_BS >= 0).sum() for batch in batches]).sum()
    if mine.device != topology.device:
        mine = torch.full((), int(mine), device=topology.device)  # a copy would wait
    return topology.sum(mine.float(), topology.data_group)


def on_device(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """Inputs and targets of a micro-batch, on their way to the device, and its document boundaries, which stay.

    From the boundaries the network makes lists whose lengths the host must know (model/positions.py).
    """
    inputs, targets = (x.to(device, non_blocking=True) for x in (batch.inputs_BS, batch.targets_BS))
    return inputs, targets, batch.cu_seqlens


def shards_of(
    fragments: list[Fragment], split: tuple[int, int], replicated: tuple[int, int], steady_state: bool = False
) -> list[Shard]:
    """Weights and optimizer state of fragments by name, as a checkpoint sees them.

    Args:
        split: (index, count) of the ranks that hold a fragment split over tensor-parallel ranks alike.
        replicated: the same for one that tensor-parallel ranks share.
        steady_state: optimizer state, like the weights, changes in `update` only, not in `accumulate`.
    """
    shards = []
    for fragment in fragments:
        place = (fragment.shape, fragment.slice_shape, fragment.slice_start, fragment.offset)
        replica = replicated if fragment.replicated else split
        for kind, values in {"weight": fragment.values, **fragment.state}.items():
            shards.append(Shard(f"{kind}/{fragment.name}", *place, values, replica, steady_state or kind == "weight"))
    return shards
