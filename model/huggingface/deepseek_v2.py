"""DeepSeek V2: layers of experts behind dense ones, or dense layers alone."""

from collections.abc import Mapping
from typing import Any, ClassVar

from model.config import ModelConfig
from model.huggingface.deepseek_v3 import DeepseekV3
from model.huggingface.experts import read_groups
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
        "v_head_dim": 128, "attention_bias": False, "mlp_bias": False, "moe_intermediate_size": 1407, "n_shared_experts": 2,
        "n_routed_experts": 64, "routed_scaling_factor": 1.0, "n_group": None, "topk_group": None, "num_experts_per_tok": None,
        "norm_topk_prob": False, "topk_method": "greedy",
    }  # fmt: skip
    harmless = DeepseekV3.harmless | {"head_dim"}  # transformers overwrites it with qk_rope_head_dim
    whole_heads = True
    count_alias = "num_experts"

    def read_attention(self, config: ConfigReader, layers: int) -> dict[str, Any]:
        """As Family.read_attention."""
        return super().read_attention(config, layers) | {"mlp_bias": config.flag("mlp_bias")}

    def read_choice(self, config: ConfigReader) -> dict[str, Any]:
        """As DeepseekV3.read_choice: by the softmax, which is not divided by the sum of the chosen ones."""
        config.only("scoring_func", None, "softmax")
        config.only("norm_topk_prob", False)
        grouped = config.choice("topk_method", ("greedy", "group_limited_greedy")) == "group_limited_greedy"
        for key in ("n_group", "topk_group"):
            config.optional_size(key)
        return {
            "scoring_func": "softmax",
            "router_bias": False,
            "norm_topk_prob": False,
            **(read_groups(config, least=1) if grouped else {"n_group": 1, "topk_group": 1}),
        }

    def choice_name(self, model: ModelConfig) -> str:
        """As DeepseekV3.choice_name."""
        return "greedy" if model.n_group == 1 else "group_limited_greedy"

    def further_layers(self, config: Mapping[str, Any]) -> int:
        """As Family.further_layers: none."""
        return 0

    def read_rotary(self, config: ConfigReader) -> None:
        """As DeepseekV3.read_rotary: no key says them."""

    def write(self, model: ModelConfig, position: PositionConfig, rope: dict[str, Any]) -> dict[str, Any]:
        """As Family.write."""
        return super().write(model, position, rope) | {"mlp_bias": model.mlp_bias}

    def written_pairs(self) -> dict[str, Any]:
        """As DeepseekV3.written_pairs."""
        return {}
