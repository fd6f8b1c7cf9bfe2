"""DeepSeek V3 of dense layers: multi-head latent attention."""

from typing import Any, ClassVar

from model.config import ModelConfig
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
"""Keys of layers with experts and of heads that predict further tokens: a dense network has neither."""


class DeepseekV3(Family):
    """Latent attention with interleaved rotary pairs."""

    model_type = "deepseek_v3"
    architecture = "DeepseekV3ForCausalLM"
    attention = "mla"
    defaults: ClassVar[dict[str, Any]] = {
        **COMMON_DEFAULTS, "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 61,
        "num_attention_heads": 128, "num_key_value_heads": 128, "max_position_embeddings": 4096, "first_k_dense_replace": 3,
        "rope_interleave": True, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "v_head_dim": 128, "attention_bias": False,
    }  # fmt: skip
    harmless = EXPERTS | {"qk_head_dim"}

    def read_attention(self, config: ConfigReader, layers: int) -> dict[str, Any]:
        """As Family.read_attention."""
        config.only("attention_bias", False)
        if config.size("first_k_dense_replace", smallest=0) < layers:
            raise config.refusal("first_k_dense_replace", f"leaves layers of experts (num_hidden_layers = {layers})")
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
            "first_k_dense_replace": model.num_hidden_layers,
            "n_routed_experts": 1,
            **self.written_pairs(),
            **self.write_rope(position, rope),
        }

    def written_pairs(self) -> dict[str, Any]:
        """Keys of the rotary pairs."""
        return {"rope_interleave": True, "num_nextn_predict_layers": 0}
