"""SwiGLU (Shazeer 2020, GLU Variants Improve Transformer, arXiv 2002.05202). Names are Hugging Face Llama's."""

from pydantic import Field
from torch import Tensor
from torch.nn.functional import silu

from model.feed_forward.base import FeedForward
from model.parallel.layers import Kit
from model.sublayer import Execution, Kept, StreamConfig


class SwiGLUConfig(StreamConfig, frozen=True):
    """Keys of the SwiGLU mlp."""

    intermediate_size: int = Field(default=704, gt=0, description="Width F of the SwiGLU mlp.")


class SwiGLU(FeedForward):
    """down(silu(gate(x)) * up(x)), its hidden units split over tensor-parallel ranks."""

    section = SwiGLUConfig

    def __init__(self, config: SwiGLUConfig, kit: Kit):
        super().__init__(config, kit)
        D, F = config.hidden_size, config.intermediate_size
        self.local_width = kit.divide("intermediate_size", F)
        self.gate_proj = kit.column(D, F, config.initial, "mlp")
        self.up_proj = kit.column(D, F, config.initial, "mlp")
        self.down_proj = kit.row(F, D, config.residual_initial, "mlp")

    def forward(self, h_TD: Tensor) -> Tensor:
        """As FeedForward.forward."""
        h_TD = self.kit.column_input(h_TD)
        return self.down_proj(silu(self.gate_proj(h_TD)) * self.up_proj(h_TD))

    def pointwise_elements(self) -> float:
        """As Sublayer.pointwise_elements: gate, up and their product."""
        return 3 * self.local_width

    def kept(self, execution: Execution, sequence_length: int) -> Kept:
        """As Sublayer.kept: gate, up, silu(gate) and the product; compiled, silu(gate) is recomputed."""
        each = self.local_width * execution.element_bytes
        return Kept(2 * each, (3 if execution.compiled else 4) * each)
