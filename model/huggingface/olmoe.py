"""OLMoE: experts in every layer, queries and keys normed over all heads."""

from typing import Any, ClassVar

from model.config import ModelConfig
from model.huggingface.experts import LOSSES, read_softmax_experts, written_experts
from model.huggingface.family import COMMON_DEFAULTS, Family
from model.huggingface.reader import ConfigReader
from model.positions.config import PositionConfig


class Olmoe(Family):
    """Grouped-query attention whose queries, keys and values are not clipped; norms before sublayers."""

    model_type = "olmoe"
    architecture = "OlmoeForCausalLM"
    defaults: ClassVar[dict[str, Any]] = {
        **COMMON_DEFAULTS, "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 2048, "num_hidden_layers": 16,
        "num_attention_heads": 16, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "attention_bias": False,
        "clip_qkv": None, "num_experts_per_tok": 8, "num_experts": 64, "norm_topk_prob": False,
    }  # fmt: skip
    harmless = LOSSES
    activations: ClassVar[dict[str, str]] = {"silu": "moe"}
    whole_heads = True

    def read_attention(self, config: ConfigReader, layers: int) -> dict[str, Any]:
        """As Family.read_attention. The norms of queries and keys have the width of the stream, whatever heads have."""
        config.only("clip_qkv", None)
        width = config.size("hidden_size") // config.size("num_attention_heads")
        if "head_dim" in config:
            config.only("head_dim", width)
        biases = {"attention_bias": "all" if config.flag("attention_bias") else "none"}
        return super().read_attention(config, layers) | biases | {"qk_norm": "rms-all-heads"}

    def read_feed_forward(self, config: ConfigReader, layers: int) -> dict[str, Any]:
        """As Family.read_feed_forward."""
        experts = read_softmax_experts(config, "num_experts", "num_local_experts", "intermediate_size")
        return super().read_feed_forward(config, layers) | experts | {"norm_topk_prob": config.flag("norm_topk_prob")}

    def write(self, model: ModelConfig, position: PositionConfig, rope: dict[str, Any]) -> dict[str, Any]:
        """As Family.write."""
        return {
            **super().write(model, position, rope),
            **written_experts(model, "num_experts", "intermediate_size"),
            "norm_topk_prob": model.norm_topk_prob,
            "attention_bias": model.attention_bias == "all",
        }
