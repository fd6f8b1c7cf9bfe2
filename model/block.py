"""One block of the decoder."""

from typing import Any

from torch import Tensor, nn

from model.attention.base import Attention, LayerCache
from model.config import ModelConfig
from model.feed_forward.base import FeedForward
from model.parallel.layers import Kit
from model.positions.batch import Positions
from model.sublayer import Execution, Sublayer, norm_bytes


class TransformerBlock(nn.Module):
    """Attention and mlp, each added to the residual stream; norms of their inputs, outputs or both. Names are Llama's, OLMo 2's
    and Gemma 3's at Hugging Face, where post_attention_layernorm is the norm before the mlp or the one after attention."""

    input_layernorm: Any
    post_attention_layernorm: Any
    pre_feedforward_layernorm: Any
    post_feedforward_layernorm: Any

    def __init__(self, config: ModelConfig, layer: int, kit: Kit):
        super().__init__()
        attention, feed_forward = config.kinds
        feed_forward = feed_forward.of_layer(config, layer)
        self.layer, self.hidden_size = layer, config.hidden_size
        self.placement, self.zero_centered = config.norm_placement, config.zero_centered_gains

        def norm() -> Any:
            return kit.norm(config.hidden_size, config.rms_norm_eps, config.zero_centered_gains)

        if self.placement != "post":
            self.input_layernorm = norm()
        self.self_attn: Attention = attention(config, layer, kit)
        self.post_attention_layernorm = norm()
        if self.placement == "sandwich":
            self.pre_feedforward_layernorm = norm()
        self.mlp: FeedForward = feed_forward(config, kit)
        if self.placement != "pre":
            self.post_feedforward_layernorm = norm()

    def forward(self, x_TD: Tensor, positions: Positions, cache: LayerCache | None = None) -> Tensor:
        """The residual stream x_TD of the next block. `cache` is this layer's of earlier tokens, if there is one."""
        y_TD = self.self_attn(self.attention_input(x_TD), positions, cache)
        rows = positions.tokens.batch
        match self.placement:
            case "pre":
                x_TD = x_TD + y_TD
                return x_TD + self.mlp(self.post_attention_layernorm(x_TD), rows)
            case "post":
                x_TD = x_TD + self.post_attention_layernorm(y_TD)
                return x_TD + self.post_feedforward_layernorm(self.mlp(x_TD, rows))
            case "sandwich":
                x_TD = x_TD + self.post_attention_layernorm(y_TD)
                return x_TD + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x_TD), rows))
            case _:
                raise ValueError(f"model.norm_placement = '{self.placement}' is unknown; legal: pre, post, sandwich")

    def attention_input(self, x_TD: Tensor) -> Tensor:
        """What attention takes of the residual stream x_TD."""
        return x_TD if self.placement == "post" else self.input_layernorm(x_TD)

    @property
    def sublayers(self) -> tuple[Sublayer, Sublayer]:
        """Attention and mlp."""
        return self.self_attn, self.mlp

    @property
    def norms(self) -> int:
        """Norms of the residual stream's width."""
        return 4 if self.placement == "sandwich" else 2

    @property
    def needed_outputs(self) -> int:
        """Sublayers whose outputs, summed over tensor-parallel ranks, the backward needs and recomputation sums again. Nothing
        needs the mlp's where it is only added to the stream."""
        return 1 if self.placement == "pre" else 2

    def pointwise_elements(self, execution: Execution) -> float:
        """Elements per token that a rank's fused pointwise kernels read and write in the forward."""
        sublayers = sum(sublayer.pointwise_elements() for sublayer in self.sublayers)
        sublayers += self.self_attn.exchange_traffic(execution)
        return (2 * self.norms + 6) * execution.stream(self.hidden_size) + sublayers  # and two sums

    def kept(self, execution: Execution, sequence_length: int) -> tuple[float, float]:
        """Bytes per token that a rank holds for the backward: until it comes to the block, and while it recomputes the block.

        Raises:
            ValueError: an unknown value of recompute.
        """
        element, compiled = execution.element_bytes, execution.compiled
        stream, whole = execution.stream(self.hidden_size), self.hidden_size * element
        norms = self.norms * norm_bytes(stream, execution, self.zero_centered) + 2 * whole
        if compiled and self.placement == "sandwich":  # the sum before the mlp is recomputed from what the other norms keep
            norms -= stream * element
        sublayers = [sublayer.kept(execution, sequence_length) for sublayer in self.sublayers]
        everything = norms + sum(kept.everything for kept in sublayers)
        match execution.recompute:
            case "none" | "auto":
                return everything, 0.0
            case "selective":
                outputs = self.needed_outputs if compiled else 2
                return (1 + outputs) * stream * element + sum(kept.products for kept in sublayers), everything
            case "experts":
                inside = sum(kept.inside_experts for kept in sublayers)
                return everything - inside, inside
            case "full":
                return stream * element, everything
            case _:
                raise ValueError(f"recompute = '{execution.recompute}' must be none, selective, experts, full or auto")
