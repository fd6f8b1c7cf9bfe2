"""What every kind of feed-forward layer has."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from model.sublayer import Sublayer


@dataclass(frozen=True)
class Routed:
    """The products of a layer's routed experts, which are made expert by expert."""

    experts: int
    copies: int
    """Experts that a token goes to."""
    elements: int
    """Of one expert, over all tensor-parallel ranks."""
    shared_flops: float
    """Forward FLOPs per token of the experts that every token passes, beside which copies of tokens travel."""


class FeedForward(Sublayer):
    """The feed-forward layer of a block. A kind is a subclass in a file of its own, with its keys, and an entry in
    model.config.FEED_FORWARD."""

    local_width: int
    """Columns of its matrix products on one tensor-parallel rank; of one expert."""

    @property
    def routed(self) -> Routed | None:
        """Its routed experts; None without any."""
        return None

    @classmethod
    def of_layer(cls, config: Any, layer: int) -> "type[FeedForward]":
        """The kind that a layer of a network of this kind has."""
        return cls

    def forward(self, h_TD: Tensor, rows: int) -> Tensor:
        """What the layer adds to the residual stream, y_TD, of the normed stream h_TD of `rows` sequences."""
        raise NotImplementedError
