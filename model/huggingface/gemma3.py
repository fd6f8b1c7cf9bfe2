"""Gemma 3, text only: four norms in a block with gains 1 + w, scaled token vectors, windows with a base of their own."""

from typing import Any, ClassVar

from model.config import ModelConfig
from model.huggingface.family import COMMON_DEFAULTS, Family, read_windows, written_windows
from model.huggingface.reader import ConfigReader
from model.huggingface.rope import read_layer_ropes, written_layer_ropes
from model.positions.config import PositionConfig

LOCAL_THETA = "rope_local_base_freq"
"""Name of the base of windowed layers in transformers 4."""


class Gemma3(Family):
    """Gemma3ForCausalLM; models with images are another architecture."""

    model_type = "gemma3_text"
    architecture = "Gemma3ForCausalLM"
    defaults: ClassVar[dict[str, Any]] = {
        **COMMON_DEFAULTS, "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 131072, "tie_word_embeddings": True, "attention_bias": False, "query_pre_attn_scalar": 256,
        "sliding_window": 4096, "final_logit_softcapping": None, "attn_logit_softcapping": None,
        "use_bidirectional_attention": False, "sliding_window_pattern": 6,
    }  # fmt: skip
    harmless = frozenset({"hidden_act", "_sliding_window_pattern"})  # in older files, beside the names that are read
    activation_key = "hidden_activation"
    theta = 1000000.0
    whole_heads = True

    def read_attention(self, config: ConfigReader, layers: int) -> dict[str, Any]:
        """As Family.read_attention."""
        for key in ("final_logit_softcapping", "attn_logit_softcapping"):
            config.only(key, None)
        config.only("use_bidirectional_attention", False, None)
        pattern = config.size("sliding_window_pattern")
        kinds = ["sliding_attention" if (layer + 1) % pattern else "full_attention" for layer in range(layers)]
        return {
            **super().read_attention(config, layers),
            "attention_bias": "all" if config.flag("attention_bias") else "none",
            "qk_norm": "rms",
            "norm_placement": "sandwich",
            "zero_centered_gains": True,
            "scale_embedding": True,
            "query_pre_attn_scalar": float(config.size("query_pre_attn_scalar")),
            **read_windows(config, layers, kinds),
        }

    def read_positions(self, config: ConfigReader, length: int) -> tuple[dict[str, Any], int]:
        """As Family.read_positions."""
        return read_layer_ropes(config, length, (self.theta, 10000.0), LOCAL_THETA)

    def write(self, model: ModelConfig, position: PositionConfig, rope: dict[str, Any]) -> dict[str, Any]:
        """As Family.write."""
        scalar = model.head_size if model.query_pre_attn_scalar is None else model.query_pre_attn_scalar
        return {
            **super().write(model, position, rope),
            **written_windows(model),
            "attention_bias": model.attention_bias == "all",
            "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
        }

    def write_rope(self, position: PositionConfig, rope: dict[str, Any]) -> dict[str, Any]:
        """As Family.write_rope."""
        return written_layer_ropes(position, rope, LOCAL_THETA)
