"""Qwen 3 with experts: all layers, or all but the first."""

from typing import Any, ClassVar

from model.config import ModelConfig
from model.huggingface.experts import LOSSES, read_softmax_experts, written_experts
from model.huggingface.family import COMMON_DEFAULTS
from model.huggingface.mistral import Mistral
from model.huggingface.reader import ConfigReader
from model.positions.config import PositionConfig


class Qwen3Moe(Mistral):
    """Queries and keys normed per head; one window in all layers, or none."""

    model_type = "qwen3_moe"
    architecture = "Qwen3MoeForCausalLM"
    defaults: ClassVar[dict[str, Any]] = {
        **COMMON_DEFAULTS, "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24,
        "num_key_value_heads": 4, "max_position_embeddings": 32768, "attention_bias": False, "use_sliding_window": False,
        "sliding_window": 4096, "decoder_sparse_step": 1, "moe_intermediate_size": 768, "num_experts_per_tok": 8,
        "num_experts": 128, "norm_topk_prob": False, "mlp_only_layers": None,
    }  # fmt: skip
    harmless = LOSSES | {"max_window_layers"}
    activations: ClassVar[dict[str, str]] = {"silu": "moe"}

    def read_attention(self, config: ConfigReader, layers: int) -> dict[str, Any]:
        """As Family.read_attention."""
        model = super().read_attention(config, layers)
        if not config.flag("use_sliding_window"):
            model.pop("sliding_window", None)
        return model | {"qk_norm": "rms", "attention_bias": "all" if config.flag("attention_bias") else "none"}

    def read_feed_forward(self, config: ConfigReader, layers: int) -> dict[str, Any]:
        """As Family.read_feed_forward."""
        config.only("decoder_sparse_step", 1)
        listed = config.take("mlp_only_layers") or []
        if not isinstance(listed, list) or any(type(layer) is not int for layer in listed):
            raise config.refusal("mlp_only_layers", "must be null or a list of numbers of layers")
        dense = sorted(set(listed))
        if dense != list(range(len(dense))) or len(dense) >= layers:
            raise config.refusal(
                "mlp_only_layers", f"must be the first layers, fewer than num_hidden_layers = {layers}; tiglon has no others"
            )
        return {
            **super().read_feed_forward(config, layers),
            **read_softmax_experts(config, "num_experts", "num_local_experts", "moe_intermediate_size"),
            "norm_topk_prob": config.flag("norm_topk_prob"),
            "first_k_dense_replace": len(dense),
        }

    def write(self, model: ModelConfig, position: PositionConfig, rope: dict[str, Any]) -> dict[str, Any]:
        """As Family.write."""
        return {
            **super().write(model, position, rope),
            **written_experts(model, "num_experts", "moe_intermediate_size"),
            "norm_topk_prob": model.norm_topk_prob,
            "decoder_sparse_step": 1,
            "mlp_only_layers": list(range(model.first_k_dense_replace)),
            "attention_bias": model.attention_bias == "all",
            "use_sliding_window": model.sliding_window is not None,
        }
