"""Llama 1 to 3.3, and the many models that take its architecture."""

from typing import Any, ClassVar

from model.config import ModelConfig
from model.huggingface.family import COMMON_DEFAULTS, Family
from model.huggingface.reader import ConfigReader
from model.positions.config import PositionConfig


class Llama(Family):
    """Grouped-query attention, with biases if it says so."""

    model_type = "llama"
    architecture = "LlamaForCausalLM"
    defaults: ClassVar[dict[str, Any]] = {
        **COMMON_DEFAULTS, "head_dim": None, "intermediate_size": 11008, "max_position_embeddings": 2048,
        "attention_bias": False, "mlp_bias": False,
    }  # fmt: skip
    whole_heads = True

    def read_attention(self, config: ConfigReader, layers: int) -> dict[str, Any]:
        """As Family.read_attention."""
        biases = {"attention_bias": "all" if config.flag("attention_bias") else "none", "mlp_bias": config.flag("mlp_bias")}
        return super().read_attention(config, layers) | biases

    def write(self, model: ModelConfig, position: PositionConfig, rope: dict[str, Any]) -> dict[str, Any]:
        """As Family.write."""
        biases = {"attention_bias": model.attention_bias == "all", "mlp_bias": model.mlp_bias}
        return super().write(model, position, rope) | biases
