"""SmolLM3: some layers without positions."""

from typing import Any, ClassVar

from model.config import ModelConfig
from model.huggingface.family import COMMON_DEFAULTS, read_switched_windows, written_switched_windows
from model.huggingface.llama import Llama
from model.huggingface.reader import ConfigReader
from model.positions.config import PositionConfig


class SmolLM3(Llama):
    """Llama of which every fourth layer, or those that a list names, do not rotate."""

    model_type = "smollm3"
    architecture = "SmolLM3ForCausalLM"
    defaults: ClassVar[dict[str, Any]] = {
        **COMMON_DEFAULTS, "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
        "num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 32768, "tie_word_embeddings": True,
        "use_sliding_window": False, "no_rope_layer_interval": 4, "attention_bias": False, "mlp_bias": False,
    }  # fmt: skip
    harmless = frozenset({"max_window_layers"})
    theta = 2000000.0
    whole_heads = False

    def read_attention(self, config: ConfigReader, layers: int) -> dict[str, Any]:
        """As Family.read_attention."""
        interval = config.size("no_rope_layer_interval")
        rotated = config.entries("no_rope_layers", layers, or_more=True)  # in spite of its name, 1 is a layer that rotates
        if rotated is None:
            rotated = [int((layer + 1) % interval != 0) for layer in range(layers)]
        if any(type(each) is not int or each not in (0, 1) for each in rotated):
            raise config.refusal("no_rope_layers", "must be a list of 1 (rotated) and 0")
        unrotated = {"layers_without_positions": [layer for layer, rotates in enumerate(rotated) if not rotates]}
        kinds = ["full_attention" if rotates else "sliding_attention" for rotates in rotated]
        return super().read_attention(config, layers) | unrotated | read_switched_windows(config, kinds)

    def write(self, model: ModelConfig, position: PositionConfig, rope: dict[str, Any]) -> dict[str, Any]:
        """As Family.write."""
        rotated = {"no_rope_layers": [int(model.rotated_layer(layer)) for layer in range(model.num_hidden_layers)]}
        return super().write(model, position, rope) | written_switched_windows(model) | rotated
