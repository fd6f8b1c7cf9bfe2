"""Small models of stock transformers, several per family, with random weights large enough to show an error."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
    "rms_norm_eps": 1e-5,
}  # fmt: skip
LATENT: dict[str, Any] = {
    **SIZES, "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8, "v_head_dim": 20, "first_k_dense_replace": 4, "n_routed_experts": 8, "num_experts_per_tok": 3,
    "n_group": 4, "topk_group": 2, "moe_intermediate_size": 24,
}  # fmt: skip
EXPERTS: dict[str, Any] = {**LATENT, "first_k_dense_replace": 1}
YARN = {"rope_type": "yarn", "rope_theta": 5e3, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e3, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 5e3, "factor": 2.0}
LAYERS = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]

CASES: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "plain": {"rope_theta": 5e3},
        "tied, llama3": {"tie_word_embeddings": True, "rope_parameters": LLAMA3},
        "biases": {"attention_bias": True, "mlp_bias": True},
        "wide heads, linear": {"head_dim": 24, "rope_parameters": LINEAR},
        "yarn": {"rope_parameters": YARN},
        "yarn, own factors": {"rope_parameters": {**YARN, "attention_factor": 1.1, "beta_fast": 16.0, "beta_slow": 2.0}},
        "yarn, mscale": {"rope_parameters": {**YARN, "mscale": 0.5, "mscale_all_dim": 1.0, "truncate": False}},
        "one kv head": {"num_key_value_heads": 1},
    },
    "mistral": {
        "window": {"sliding_window": 12},
        "no window": {"sliding_window": None, "head_dim": 24},
        "window, yarn": {"sliding_window": 12, "rope_parameters": YARN},
    },
    "qwen2": {
        "plain": {},
        "tied, yarn": {"tie_word_embeddings": True, "rope_parameters": YARN},
        "upper layers windowed": {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 2},
    },
    "qwen3": {
        "plain": {"head_dim": 24},
        "tied, biases": {"head_dim": 16, "tie_word_embeddings": True, "attention_bias": True},
        "windows, yarn": {
            "head_dim": 24, "use_sliding_window": True, "sliding_window": 12, "layer_types": LAYERS, "rope_parameters": YARN,
        },
        "upper layers windowed": {"head_dim": 24, "use_sliding_window": True, "sliding_window": 12, "max_window_layers": 2},
    },
    "smollm3": {
        "plain": {"pad_token_id": 0},
        "biases, own layers": {
            "pad_token_id": 0, "attention_bias": True, "mlp_bias": True, "no_rope_layers": [0, 1, 1, 0],
            "tie_word_embeddings": False,
        },
        "windows": {"pad_token_id": 0, "use_sliding_window": True, "sliding_window": 12, "no_rope_layer_interval": 2},
    },
    "olmo2": {
        "plain": {"pad_token_id": 0},
        "tied, biases": {"pad_token_id": 0, "tie_word_embeddings": True, "attention_bias": True},
        "one kv head": {"pad_token_id": 0, "num_key_value_heads": 1, "rope_parameters": YARN},
    },
    "olmo3": {
        "plain": {"pad_token_id": 0, "sliding_window": 12},
        "yarn": {
            "pad_token_id": 0, "sliding_window": 12, "layer_types": LAYERS,
            "rope_parameters": {
                "full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
            },
        },
    },
    "gemma3_text": {
        "plain": {"pad_token_id": 0, "head_dim": 24, "query_pre_attn_scalar": 20, "sliding_window": 12, "layer_types": LAYERS},
        "linear, untied": {
            "pad_token_id": 0, "head_dim": 16, "sliding_window": 12, "layer_types": LAYERS, "tie_word_embeddings": False,
            "rope_parameters": {
                "full_attention": LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    },
    "phi3": {
        "plain": {"pad_token_id": 0},
        "tied, window": {"pad_token_id": 0, "tie_word_embeddings": True, "sliding_window": 12},
    },
    "mixtral": {
        "plain": {"num_local_experts": 4, "intermediate_size": 24},
        "window, yarn": {
            "num_local_experts": 5, "num_experts_per_tok": 1, "intermediate_size": 24, "sliding_window": 12, "head_dim": 24,
            "rope_parameters": YARN, "tie_word_embeddings": True,
        },
    },
    "qwen3_moe": {
        "plain": {
            "head_dim": 24, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "norm_topk_prob": True,
        },
        "first layers dense, window": {
            "head_dim": 24, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "mlp_only_layers": [1, 0],
            "use_sliding_window": True, "sliding_window": 12, "attention_bias": True, "tie_word_embeddings": True,
        },
    },
    "olmoe": {
        "plain": {"pad_token_id": 0, "num_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 24},
        "normalised, biases": {
            "pad_token_id": 0, "num_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 24, "norm_topk_prob": True,
            "attention_bias": True, "num_key_value_heads": 1, "rope_parameters": YARN,
        },
    },
    "deepseek_v2": {
        "experts, groups": {**EXPERTS, "topk_method": "group_limited_greedy", "routed_scaling_factor": 2.0},
        "experts": {**EXPERTS, "first_k_dense_replace": 0, "n_shared_experts": 1, "n_group": None, "topk_group": None},
        "plain": {**LATENT},
        "full-rank queries, yarn": {**LATENT, "q_lora_rank": None, "rope_parameters": YARN},
    },
    "deepseek_v3": {
        "experts, groups": {**EXPERTS},
        "experts, weights as they are": {
            **EXPERTS, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1, "n_shared_experts": 2,
            "norm_topk_prob": False, "num_nextn_predict_layers": 0,
        },
        "plain": {**LATENT},
        "yarn": {**LATENT, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
        "tied, yarn, own mscale": {
            **LATENT, "tie_word_embeddings": True, "rope_parameters": {**YARN, "mscale": 0.5, "mscale_all_dim": 0.8},
        },
        "yarn without mscale": {**LATENT, "q_lora_rank": None, "rope_parameters": YARN},
    },
}  # fmt: skip
"""model_type -> name -> what differs from SIZES."""


@dataclass(frozen=True)
class Case:
    """One small model."""

    family: str
    """transformers' model_type."""
    name: str

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments of transformers' configuration class."""
        return {**SIZES, **CASES[self.family][self.name]}

    def __str__(self) -> str:
        return f"{self.family}: {self.name}"


ALL = [Case(family, name) for family, names in CASES.items() for name in names]


def stock_model(case: Case, seed: int = 0, **changes: Any) -> Any:
    """transformers' model in float32 with random weights, in evaluation mode; `changes` are of its configuration."""
    config = transformers.AutoConfig.for_model(case.family, **{**case.settings, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            gain = "norm" in name and case.family != "gemma3_text"  # Gemma's gains are 1 + w
            parameter.copy_(1 + 0.2 * drawn if gain else 0.2 * drawn)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
    return model


def save_stock(case: Case, folder: Path, seed: int = 0) -> Any:
    """Write config.json and safetensors of a case to `folder`; returns the model."""
    model = stock_model(case, seed)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def stock_logits(model: Any, tokens_BS: torch.Tensor) -> torch.Tensor:
    """[B, S, V] of transformers."""
    return model(tokens_BS, use_cache=False).logits
