"""OLMo 3: OLMo 2 of which three layers in four are windowed and rotate by plain RoPE."""

from typing import Any, ClassVar

from model.config import ModelConfig
from model.huggingface.family import read_windows, written_windows
from model.huggingface.olmo2 import Olmo2
from model.huggingface.reader import ConfigReader
from model.huggingface.rope import read_layer_ropes, written_layer_ropes
from model.positions.config import PositionConfig


class Olmo3(Olmo2):
    """OLMo 2 with windows."""

    model_type = "olmo3"
    architecture = "Olmo3ForCausalLM"
    defaults: ClassVar[dict[str, Any]] = {**Olmo2.defaults, "sliding_window": 4096}
    theta = 500000.0

    def read_attention(self, config: ConfigReader, layers: int) -> dict[str, Any]:
        """As Family.read_attention."""
        kinds = ["full_attention" if (layer + 1) % 4 == 0 else "sliding_attention" for layer in range(layers)]
        return super().read_attention(config, layers) | read_windows(config, layers, kinds)

    def read_positions(self, config: ConfigReader, length: int) -> tuple[dict[str, Any], int]:
        """As Family.read_positions."""
        return read_layer_ropes(config, length, (self.theta, self.theta))

    def write(self, model: ModelConfig, position: PositionConfig, rope: dict[str, Any]) -> dict[str, Any]:
        """As Family.write."""
        return super().write(model, position, rope) | written_windows(model)

    def write_rope(self, position: PositionConfig, rope: dict[str, Any]) -> dict[str, Any]:
        """As Family.write_rope."""
        return written_layer_ropes(position, rope)
