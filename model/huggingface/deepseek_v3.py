"""DeepSeek V3: multi-head latent attention, layers of experts behind dense ones, or dense layers alone."""

from collections.abc import Mapping
from typing import Any, ClassVar

from model.config import ModelConfig
from model.huggingface.experts import read_count, read_groups
from model.huggingface.family import COMMON_DEFAULTS, Family
from model.huggingface.reader import ConfigReader
from model.huggingface.rope import read_rope
from model.positions.config import PositionConfig

LATENT_EPS = 1e-6
"""Epsilon of the latents' norms in transformers, whatever config.json says."""
EXPERTS = frozenset({
    "moe_intermediate_size", "n_shared_experts", "n_routed_experts", "num_experts", "num_local_experts",
    "routed_scaling_factor",
    "n_group", "topk_group", "topk_method", "num_experts_per_tok", "norm_topk_prob", "output_router_logits", "scoring_func",
    "aux_loss_alpha", "router_aux_loss_coef", "seq_aux", "moe_layer_freq", "ep_size", "num_nextn_predict_layers",
    "num_mtp_layers",
})  # fmt: skip
"""Keys of layers with experts, which a dense network has not; of the losses that they are trained with; and of layers that
predict further tokens, which are no part of the network."""


class DeepseekV3(Family):
    """Latent attention with interleaved rotary pairs."""

    model_type = "deepseek_v3"
    architecture = "DeepseekV3ForCausalLM"
    attention = "mla"
    defaults: ClassVar[dict[str, Any]] = {
        **COMMON_DEFAULTS, "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 61,
        "num_attention_heads": 128, "num_key_value_heads": 128, "max_position_embeddings": 4096, "first_k_dense_replace": 3,
        "rope_interleave": True, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "v_head_dim": 128, "attention_bias": False, "moe_intermediate_size": 2048, "n_shared_experts": 1,
        "n_routed_experts": 256, "routed_scaling_factor": 2.5, "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8,
        "norm_topk_prob": True,
    }  # fmt: skip
    harmless = EXPERTS | {"qk_head_dim"}
    with_experts = True
    count_alias = "num_local_experts"
    """transformers' other name of n_routed_experts."""

    def read_attention(self, config: ConfigReader, layers: int) -> dict[str, Any]:
        """As Family.read_attention."""
        config.only("attention_bias", False)
        self.read_rotary(config)
        heads = config.size("num_attention_heads")
        if (config.optional_size("num_key_value_heads") or heads) != heads:
            raise config.refusal("num_key_value_heads", f"must be num_attention_heads = {heads} in latent attention")
        names = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        return {
            "attention": "mla",
            "latent_norm_eps": LATENT_EPS,
            "q_lora_rank": config.optional_size("q_lora_rank"),
            **{name: config.size(name) for name in names},
        }

    def read_feed_forward(self, config: ConfigReader, layers: int) -> dict[str, Any]:
        """As Family.read_feed_forward."""
        dense = config.size("first_k_dense_replace", smallest=0)
        if dense >= layers:
            return super().read_feed_forward(config, layers)
        config.only(self.activation_key, "silu")
        config.only("moe_layer_freq", None, 1)
        if not isinstance(config.take("routed_scaling_factor"), float):
            raise config.refusal("routed_scaling_factor", "is no number with a decimal point, as transformers wants it")
        return {
            "feed_forward": "moe",
            "first_k_dense_replace": dense,
            **read_count(config, "n_routed_experts", self.count_alias),
            "moe_intermediate_size": config.size("moe_intermediate_size"),
            "n_shared_experts": config.size("n_shared_experts"),
            "routed_scaling_factor": config.number("routed_scaling_factor"),
            **self.read_choice(config),
        }

    def read_choice(self, config: ConfigReader) -> dict[str, Any]:
        """How the router chooses."""
        config.only("scoring_func", None, "sigmoid")
        config.only("topk_method", None, "noaux_tc")
        return {
            "scoring_func": "sigmoid",
            "router_bias": True,
            "norm_topk_prob": config.flag("norm_topk_prob"),
            **read_groups(config, least=2),
        }

    def further_layers(self, config: Mapping[str, Any]) -> int:
        """As Family.further_layers: those that predict further tokens (multi-token prediction)."""
        number = config.get("num_nextn_predict_layers", config.get("num_mtp_layers", 1))
        return number if isinstance(number, int) else 0

    def read_rotary(self, config: ConfigReader) -> None:
        """Refuse rotary pairs that are not interleaved, and another number of them than the rotated part of a head has."""
        config.only("rope_interleave", True)
        rotated = config.size("qk_rope_head_dim")
        if "head_dim" in config and config.take("head_dim") != rotated:
            raise config.refusal("head_dim", f"must be qk_rope_head_dim = {rotated}: it is the number of rotated channels")

    def read_positions(self, config: ConfigReader, length: int) -> tuple[dict[str, Any], int]:
        """As Family.read_positions."""
        return read_rope(config, length, self.theta, latent=True)

    def write(self, model: ModelConfig, position: PositionConfig, rope: dict[str, Any]) -> dict[str, Any]:
        """As Family.write."""
        names = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        return {
            "num_key_value_heads": model.num_attention_heads,
            **{name: getattr(model, name) for name in names},
            **self.written_pairs(),
            **self.write_rope(position, rope),
            **self.write_feed_forward(model),
        }

    def write_feed_forward(self, model: ModelConfig) -> dict[str, Any]:
        """Keys of layers of experts, if there are any."""
        if model.feed_forward != "moe":
            return {"first_k_dense_replace": model.num_hidden_layers, "n_routed_experts": 1}
        names = (
            "first_k_dense_replace", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_shared_experts",
            "routed_scaling_factor", "norm_topk_prob", "n_group", "topk_group", "scoring_func",
        )  # fmt: skip
        values = {name: getattr(model, name) for name in names}
        return values | {"topk_method": self.choice_name(model), "moe_layer_freq": 1}

    def choice_name(self, model: ModelConfig) -> str:
        """The name of the way in which the router chooses."""
        return "noaux_tc"

    def written_pairs(self) -> dict[str, Any]:
        """Keys of the rotary pairs."""
        return {"rope_interleave": True, "num_nextn_predict_layers": 0}
