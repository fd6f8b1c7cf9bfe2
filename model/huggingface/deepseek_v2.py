"""DeepSeek V2 of dense layers."""

from typing import Any, ClassVar

from model.config import ModelConfig
from model.huggingface.deepseek_v3 import DeepseekV3
from model.huggingface.family import COMMON_DEFAULTS
from model.huggingface.reader import ConfigReader
from model.positions.config import PositionConfig


class DeepseekV2(DeepseekV3):
    """DeepSeek V3's attention; rotary pairs are always interleaved."""

    model_type = "deepseek_v2"
    architecture = "DeepseekV2ForCausalLM"
    defaults: ClassVar[dict[str, Any]] = {
        **COMMON_DEFAULTS, "vocab_size": 102400, "intermediate_size": 11008, "max_position_embeddings": 2048,
        "first_k_dense_replace": 0, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "v_head_dim": 128, "attention_bias": False, "mlp_bias": False,
    }  # fmt: skip
    harmless = DeepseekV3.harmless | {"head_dim"}  # transformers overwrites it with qk_rope_head_dim
    whole_heads = True

    def read_attention(self, config: ConfigReader, layers: int) -> dict[str, Any]:
        """As Family.read_attention."""
        return super().read_attention(config, layers) | {"mlp_bias": config.flag("mlp_bias")}

    def read_rotary(self, config: ConfigReader) -> None:
        """As DeepseekV3.read_rotary: no key says them."""

    def write(self, model: ModelConfig, position: PositionConfig, rope: dict[str, Any]) -> dict[str, Any]:
        """As Family.write."""
        return super().write(model, position, rope) | {"mlp_bias": model.mlp_bias}

    def written_pairs(self) -> dict[str, Any]:
        """As DeepseekV3.written_pairs."""
        return {}
