"""Qwen 2 and 2.5: biases of queries, keys and values; windows from a layer on, if at all."""

from typing import Any, ClassVar

from model.config import ModelConfig
from model.huggingface.family import COMMON_DEFAULTS, Family, read_switched_windows, written_switched_windows
from model.huggingface.reader import ConfigReader
from model.positions.config import PositionConfig


class Qwen2(Family):
    """Grouped-query attention with biases, without one of its output."""

    model_type = "qwen2"
    architecture = "Qwen2ForCausalLM"
    defaults: ClassVar[dict[str, Any]] = {
        **COMMON_DEFAULTS, "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32,
        "max_position_embeddings": 32768, "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28,
    }  # fmt: skip
    harmless = frozenset({"use_mrope"})  # of models with images

    def read_attention(self, config: ConfigReader, layers: int) -> dict[str, Any]:
        """As Family.read_attention."""
        first = config.size("max_window_layers", smallest=0)
        kinds = ["full_attention" if layer < first else "sliding_attention" for layer in range(layers)]
        return super().read_attention(config, layers) | self.read_biases(config) | read_switched_windows(config, kinds)

    def read_biases(self, config: ConfigReader) -> dict[str, Any]:
        """Biases of attention; no key says them."""
        return {"attention_bias": "qkv"}

    def write(self, model: ModelConfig, position: PositionConfig, rope: dict[str, Any]) -> dict[str, Any]:
        """As Family.write."""
        return super().write(model, position, rope) | written_switched_windows(model)
