"""One block of the decoder."""

from torch import Tensor, nn

from model.attention.base import Attention
from model.attention.kv_cache import LayerKVCache
from model.config import ModelConfig
from model.feed_forward.base import FeedForward
from model.parallel.layers import Kit
from model.positions.batch import Positions
from model.sublayer import Execution, Sublayer


class TransformerBlock(nn.Module):
    """Pre-norm attention and mlp, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int, kit: Kit):
        super().__init__()
        attention, feed_forward = config.kinds
        self.hidden_size = config.hidden_size
        self.input_layernorm = kit.norm(config.hidden_size, config.rms_norm_eps)
        self.self_attn: Attention = attention(config, layer, kit)
        self.post_attention_layernorm = kit.norm(config.hidden_size, config.rms_norm_eps)
        self.mlp: FeedForward = feed_forward(config, kit)

    def forward(self, x_TD: Tensor, positions: Positions, cache: LayerKVCache | None = None) -> Tensor:
        """The residual stream x_TD of the next block. `cache` is this layer's, when decoding."""
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), positions, cache)
        return x_TD + self.mlp(self.post_attention_layernorm(x_TD))

    @property
    def sublayers(self) -> tuple[Sublayer, Sublayer]:
        """Attention and mlp."""
        return self.self_attn, self.mlp

    def pointwise_elements(self, execution: Execution) -> float:
        """Elements per token that a rank's fused pointwise kernels read and write in the forward."""
        sublayers = sum(sublayer.pointwise_elements() for sublayer in self.sublayers)
        return 10 * execution.stream(self.hidden_size) + sublayers  # two norms and two sums

    def kept(self, execution: Execution, sequence_length: int) -> tuple[float, float]:
        """Bytes per token that a rank holds for the backward: until it comes to the block, and while it recomputes the block.

        Raises:
            ValueError: an unknown value of recompute.
        """
        element, compiled = execution.element_bytes, execution.compiled
        stream, whole = execution.stream(self.hidden_size), self.hidden_size * element
        # compiled, a norm keeps its input as it is and one float32 per token
        norms = 2 * ((stream * element + 4 if compiled else norm_bytes(self.hidden_size, execution)) + whole)
        sublayers = [sublayer.kept(execution, sequence_length) for sublayer in self.sublayers]
        everything = norms + sum(kept.everything for kept in sublayers)
        match execution.recompute:
            case "none" | "auto":
                return everything, 0.0
            case "selective":
                return (2 if compiled else 3) * stream * element + sum(kept.products for kept in sublayers), everything
            case "full":
                return stream * element, everything
            case _:
                raise ValueError(f"recompute = '{execution.recompute}' must be none, selective, full or auto")


def norm_bytes(width: int, execution: Execution) -> float:
    """Bytes per token that an RMSNorm of the residual stream saves: its input in float32 and the normed values. Its output is
    saved, whole, by the next matrix product."""
    return execution.stream(width) * (4 + execution.element_bytes)
