"""What the loop asks of an engine. Two answer: `zero` (DeepSpeed) and `fold`."""

from typing import Protocol

from torch import Tensor, nn

from trainer.checkpoint import Shard
from trainer.fragments import Fragment
from trainer.optimizer import Update


class Batch(Protocol):
    """One micro-batch of one data-parallel rank; data/stream.py makes them."""

    inputs_BS: Tensor
    targets_BS: Tensor
    cu_seqlens: Tensor | None


class Engine(Protocol):
    """Gradients and updates, however ranks hold weights, gradients and optimizer state."""

    model: nn.Module

    def accumulate(self, batches: list[Batch]) -> Tensor:
        """Gradients of one update's micro-batches; mean loss in nats a target over all ranks (0-dim, on device)."""
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
