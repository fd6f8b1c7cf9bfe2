"""Phi 3 and 3.5 mini of short contexts: projections fused, otherwise Mistral."""

from typing import Any, ClassVar

from model.huggingface.family import COMMON_DEFAULTS
from model.huggingface.mistral import Mistral
from model.huggingface.reader import ConfigReader
from model.huggingface.rope import read_rope


class Phi3(Mistral):
    """Mistral whose queries, keys and values are one tensor, and gate and up another."""

    model_type = "phi3"
    architecture = "Phi3ForCausalLM"
    defaults: ClassVar[dict[str, Any]] = {
        **COMMON_DEFAULTS, "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
    }  # fmt: skip
    harmless = frozenset({"embd_pdrop", "original_max_position_embeddings", "attention_bias"})
    fused: ClassVar[dict[str, tuple[str, ...]]] = {
        "self_attn.qkv_proj.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        "mlp.gate_up_proj.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    }

    def read_positions(self, config: ConfigReader, length: int) -> tuple[dict[str, Any], int]:
        """As Family.read_positions. Only plain RoPE: its frequency scaling, longrope, changes with the length of the text."""
        config.only("resid_pdrop", 0, 0.0)
        position, length = read_rope(config, length, self.theta)
        if position["kind"] != "rope":
            raise config.refusal(
                "rope_scaling" if config.take("rope_scaling") else "rope_parameters", "must have rope_type default"
            )
        return position, length
