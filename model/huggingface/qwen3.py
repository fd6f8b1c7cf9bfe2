"""Qwen 3 (dense): queries and keys normed per head."""

from typing import Any, ClassVar

from model.config import ModelConfig
from model.huggingface.qwen2 import Qwen2
from model.huggingface.reader import ConfigReader
from model.positions.config import PositionConfig


class Qwen3(Qwen2):
    """Qwen 2 with norms of queries and keys, and biases only where it says so."""

    model_type = "qwen3"
    architecture = "Qwen3ForCausalLM"
    defaults: ClassVar[dict[str, Any]] = {**Qwen2.defaults, "head_dim": 128, "attention_bias": False}

    def read_biases(self, config: ConfigReader) -> dict[str, Any]:
        """As Qwen2.read_biases."""
        return {"qk_norm": "rms", "attention_bias": "all" if config.flag("attention_bias") else "none"}

    def write(self, model: ModelConfig, position: PositionConfig, rope: dict[str, Any]) -> dict[str, Any]:
        """As Family.write."""
        return super().write(model, position, rope) | {"attention_bias": model.attention_bias == "all"}
