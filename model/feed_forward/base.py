"""What every kind of feed-forward layer has."""

from torch import Tensor

from model.sublayer import Sublayer


class FeedForward(Sublayer):
    """The feed-forward layer of a block. A kind is a subclass in a file of its own, with its keys, and an entry in
    model.config.FEED_FORWARD."""

    local_width: int
    """Columns of its matrix products on one tensor-parallel rank."""

    def forward(self, h_TD: Tensor) -> Tensor:
        """What the layer adds to the residual stream, y_TD, of the normed stream h_TD."""
        raise NotImplementedError
