"""Mixtral: Mistral of which every layer has experts."""

from typing import Any, ClassVar

from model.config import ModelConfig
from model.huggingface.experts import LOSSES, read_softmax_experts, written_experts
from model.huggingface.family import COMMON_DEFAULTS
from model.huggingface.mistral import Mistral
from model.huggingface.reader import ConfigReader
from model.positions.config import PositionConfig

EXPERT_NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
"""Of an expert's matrices."""


class Mixtral(Mistral):
    """Grouped-query attention with one window in all layers or none; the weights of a token's experts add to 1."""

    model_type = "mixtral"
    architecture = "MixtralForCausalLM"
    defaults: ClassVar[dict[str, Any]] = {
        **COMMON_DEFAULTS, "head_dim": None, "intermediate_size": 14336, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072, "sliding_window": None, "num_experts_per_tok": 2, "num_local_experts": 8,
        "router_jitter_noise": 0.0,
    }  # fmt: skip
    harmless = LOSSES
    activations: ClassVar[dict[str, str]] = {"silu": "moe"}
    theta = 1000000.0

    def read_feed_forward(self, config: ConfigReader, layers: int) -> dict[str, Any]:
        """As Family.read_feed_forward."""
        config.only("router_jitter_noise", 0, 0.0)
        experts = read_softmax_experts(config, "num_local_experts", "num_experts", "intermediate_size")
        return super().read_feed_forward(config, layers) | experts | {"norm_topk_prob": True}

    def read_positions(self, config: ConfigReader, length: int) -> tuple[dict[str, Any], int]:
        """As Family.read_positions. Without head_dim transformers fails at YaRN, in this family alone."""
        position, length = super().read_positions(config, length)
        if position["kind"] == "yarn" and config.take("head_dim") is None:
            key = "rope_scaling" if config.take("rope_scaling") else "rope_parameters"
            raise config.refusal(key, "wants a head_dim, which is missing or null; add it")
        return position, length

    def write(self, model: ModelConfig, position: PositionConfig, rope: dict[str, Any]) -> dict[str, Any]:
        """As Family.write."""
        return super().write(model, position, rope) | written_experts(model, "num_local_experts", "intermediate_size")

    def stored_name(self, name: str) -> str:
        """As Family.stored_name."""
        if ".mlp." not in name:
            return name
        prefix, _, rest = name.partition(".mlp.")
        for ours, theirs in EXPERT_NAMES.items():
            rest = rest.replace(ours, theirs)
        return f"{prefix}.block_sparse_moe.{rest}"
