"""The feed-forward layer of a block."""

from torch import Tensor, nn
from torch.nn.functional import silu

from model.config import ModelConfig
from model.parallel.layers import Kit


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, kit: Kit):
        super().__init__()
        self.kit = kit
        self.gate_proj = kit.column(config.hidden_size, config.intermediate_size)
        self.up_proj = kit.column(config.hidden_size, config.intermediate_size)
        self.down_proj = kit.row(config.intermediate_size, config.hidden_size)

    def forward(self, h_TD: Tensor) -> Tensor:
        """What the mlp adds to the residual stream, y_TD."""
        h_TD = self.kit.column_input(h_TD)
        return self.down_proj(silu(self.gate_proj(h_TD)) * self.up_proj(h_TD))
