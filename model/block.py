"""One block of the decoder."""

from torch import Tensor, nn

from model.attention.kinds import make_attention
from model.attention.kv_cache import LayerKVCache
from model.config import ModelConfig
from model.mlp import MLP
from model.parallel.layers import Kit
from model.positions.batch import Positions


class TransformerBlock(nn.Module):
    """Pre-norm attention and mlp, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int, kit: Kit):
        super().__init__()
        self.input_layernorm = kit.norm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = make_attention(config, layer, kit)
        self.post_attention_layernorm = kit.norm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, kit)

    def forward(self, x_TD: Tensor, positions: Positions, cache: LayerKVCache | None = None) -> Tensor:
        """The residual stream x_TD of the next block. `cache` is this layer's, when decoding."""
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), positions, cache)
        return x_TD + self.mlp(self.post_attention_layernorm(x_TD))
