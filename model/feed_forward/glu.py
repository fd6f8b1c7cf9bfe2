"""Gated linear units (Shazeer 2020, GLU Variants Improve Transformer, arXiv 2002.05202). Names are Hugging Face Llama's."""

from collections.abc import Callable

from pydantic import Field
from torch import Tensor

from model.feed_forward.base import FeedForward
from model.parallel.layers import Kit
from model.sublayer import Execution, Kept, StreamConfig


class GLUConfig(StreamConfig, frozen=True):
    """Keys of an mlp with a gate."""

    intermediate_size: int = Field(default=704, gt=0, description="Width F of the mlp.")
    mlp_bias: bool = Field(default=False, description="Biases of the mlp's gate, up and down projections.")


class GLU(FeedForward):
    """down(activation(gate(x)) * up(x)), its hidden units split over tensor-parallel ranks.

    Args:
        width: default intermediate_size.
        summed: False: a tensor-parallel rank returns the part of the sum that its own hidden units make.
    """

    section = GLUConfig
    activation: Callable[[Tensor], Tensor]
    """Pointwise; it saves its input, and its result is saved by the product."""

    def __init__(self, config: GLUConfig, kit: Kit, width: int | None = None, summed: bool = True):
        super().__init__(config, kit)
        D, F, bias = config.hidden_size, width or config.intermediate_size, config.mlp_bias
        self.local_width = kit.divide("intermediate_size", F)
        self.gate_proj = kit.column(D, F, config.initial, "mlp", bias)
        self.up_proj = kit.column(D, F, config.initial, "mlp", bias)
        self.down_proj = kit.row(F, D, config.residual_initial, "mlp", bias, summed)

    def forward(self, h_TD: Tensor, rows: int) -> Tensor:
        """As FeedForward.forward."""
        return self.transform(self.kit.column_input(h_TD))

    def transform(self, h_TD: Tensor) -> Tensor:
        """The same of an input that is whole on every tensor-parallel rank."""
        return self.down_proj(self.activation(self.gate_proj(h_TD)) * self.up_proj(h_TD))

    def pointwise_elements(self) -> float:
        """As Sublayer.pointwise_elements: gate, up and their product."""
        return 3 * self.local_width

    def kept(self, execution: Execution, sequence_length: int) -> Kept:
        """As Sublayer.kept: gate, up, activation(gate) and the product; compiled, activation(gate) is recomputed."""
        each = self.local_width * execution.element_bytes
        return Kept(2 * each, (3 if execution.compiled else 4) * each)
