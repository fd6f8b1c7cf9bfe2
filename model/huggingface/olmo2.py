"""OLMo 2: sublayers are normed after, and queries and keys over all heads."""

from typing import Any, ClassVar

from model.config import ModelConfig
from model.huggingface.family import COMMON_DEFAULTS, Family
from model.huggingface.reader import ConfigReader
from model.positions.config import PositionConfig


class Olmo2(Family):
    """Grouped-query attention; norms of sublayers' outputs, of all queries and of all keys."""

    model_type = "olmo2"
    architecture = "Olmo2ForCausalLM"
    defaults: ClassVar[dict[str, Any]] = {
        **COMMON_DEFAULTS, "vocab_size": 50304, "intermediate_size": 11008, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048, "attention_bias": False,
    }  # fmt: skip

    def read_attention(self, config: ConfigReader, layers: int) -> dict[str, Any]:
        """As Family.read_attention."""
        biases = {"attention_bias": "all" if config.flag("attention_bias") else "none"}
        norms = {"norm_placement": "post", "qk_norm": "rms-all-heads"}
        return super().read_attention(config, layers) | biases | norms

    def write(self, model: ModelConfig, position: PositionConfig, rope: dict[str, Any]) -> dict[str, Any]:
        """As Family.write."""
        return super().write(model, position, rope) | {"attention_bias": model.attention_bias == "all"}
