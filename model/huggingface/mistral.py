"""Mistral: every layer windowed, or none."""

from typing import Any, ClassVar

from model.config import ModelConfig
from model.huggingface.family import COMMON_DEFAULTS, Family
from model.huggingface.reader import ConfigReader
from model.positions.config import PositionConfig


class Mistral(Family):
    """Grouped-query attention with one window in all layers."""

    model_type = "mistral"
    architecture = "MistralForCausalLM"
    defaults: ClassVar[dict[str, Any]] = {
        **COMMON_DEFAULTS, "head_dim": None, "intermediate_size": 14336, "num_key_value_heads": 8,
        "max_position_embeddings": 131072, "sliding_window": 4096,
    }  # fmt: skip

    def read_attention(self, config: ConfigReader, layers: int) -> dict[str, Any]:
        """As Family.read_attention."""
        window = config.optional_size("sliding_window")
        return super().read_attention(config, layers) | ({} if window is None else {"sliding_window": window})

    def write(self, model: ModelConfig, position: PositionConfig, rope: dict[str, Any]) -> dict[str, Any]:
        """As Family.write."""
        return super().write(model, position, rope) | {"sliding_window": model.sliding_window}
