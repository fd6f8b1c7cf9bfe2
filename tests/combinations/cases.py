"""Small configurations, batches and weights that the reference is compared on."""

from typing import Any

import torch
from torch import Tensor

from launch.config import RunConfig
from launch.load_config import build_config
from tests.combinations.network import Batch
from tests.combinations.weights import initial_weights, kind

S, ROWS, VOCABULARY = 24, 3, 53
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.1,
}
LATENT = {
    "attention": "mla",
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
}
EXPERTS = {"feed_forward": "moe", "n_routed_experts": 6, "moe_intermediate_size": 12}
WINDOWED = {"num_hidden_layers": 3, "sliding_window": 11, "full_attention_layers": [-1]}
"""Windows longer than those of the maps below, whose far region windowed layers do not have."""
BOUNDARIES = [0, 5, 6, 24, 31, 48, 72]


def configured(**sections: dict[str, Any]) -> RunConfig:
    """A small float32 configuration with some keys set."""
    values: dict[str, Any] = {"model": SIZES, "train": {"sequence_length": S, "precision": "fp32"}}
    for name, keys in sections.items():
        values[name] = {**values.get(name, {}), **keys}
    return build_config(values)


def tokens(seed: int = 0, rows: int = ROWS) -> Tensor:
    """Ids [rows, S + 1]."""
    return torch.randint(0, VOCABULARY, (rows, S + 1), generator=torch.Generator().manual_seed(seed))


def batch(seed: int = 0, documents: bool = False) -> Batch:
    """Three rows, of which some targets are not scored."""
    drawn = tokens(seed)
    targets = drawn[:, 1:].clone()
    targets[0, -3:] = -100
    return drawn[:, :-1], targets, torch.tensor(BOUNDARIES, dtype=torch.int32) if documents else None


MODELS = {
    "mha": {},
    "gqa": {"num_key_value_heads": 2},
    "mqa": {"num_key_value_heads": 1},
    "wide heads": {"num_key_value_heads": 2, "head_dim": 12},
    "untied": {"tie_word_embeddings": False},
    "plain": {"tied_head": "plain"},
    "projection": {"tied_head": "projection"},
    "small-init": {"tied_head": "small-init"},
    "residual plain": {"residual_init": "plain"},
    "residual zero": {"residual_init": "zero"},
    "rms": {"qk_norm": "rms", "num_key_value_heads": 2, "rms_norm_eps": 1e-2},
    "key-l2": {"qk_norm": "key-l2"},
    "windowed": {"sliding_window": 7},
    "hwfa2": WINDOWED,
    "hwfa": {**WINDOWED, "full_attention_position": "none"},
    "window longer than the rows": {"sliding_window": 40, "full_attention_layers": [0]},
    "first unrotated": {"layers_without_positions": [0]},
    "windowed, last unrotated": {"sliding_window": 7, "layers_without_positions": [-1]},
    "hwfa2, ends unrotated": {**WINDOWED, "layers_without_positions": [0, -1]},
    "mla, first unrotated": {**LATENT, "layers_without_positions": [0]},
    "mla, windowed": {**LATENT, **WINDOWED},
    "biases": {"num_key_value_heads": 2, "attention_bias": "qkv", "mlp_bias": True},
    "biases of outputs": {"num_key_value_heads": 2, "attention_bias": "all"},
    "moe": EXPERTS,
    "moe, groups": {**EXPERTS, "n_group": 3, "topk_group": 2, "routed_scaling_factor": 2.5, "first_k_dense_replace": 1},
    "moe, softmax": {
        **EXPERTS, "scoring_func": "softmax", "norm_topk_prob": False, "router_bias": False, "n_shared_experts": 0,
    },
    "post": {"num_key_value_heads": 2, "norm_placement": "post", "qk_norm": "rms-all-heads", "rms_norm_eps": 1e-2},
    "sandwich": {
        "norm_placement": "sandwich", "zero_centered_gains": True, "scale_embedding": True, "feed_forward": "geglu",
        "qk_norm": "rms", "query_pre_attn_scalar": 3.0, "head_dim": 12,
    },
    "zero-centred, all heads": {"num_key_value_heads": 1, "qk_norm": "rms-all-heads", "zero_centered_gains": True},
    "zero-centred mla": {**LATENT, "q_lora_rank": 14, "zero_centered_gains": True, "norm_placement": "post", "mlp_bias": True},
    "mla": LATENT,
    "mla with query latent": {**LATENT, "q_lora_rank": 14},
    "latents of another epsilon": {**LATENT, "q_lora_rank": 14, "latent_norm_eps": 0.1},
}  # fmt: skip
POSITIONS = {
    "rope": {"rope_theta": 500.0},
    "none": {"kind": "none"},
    "pi": {"kind": "pi", "factor": 4.0},
    "ntk": {"kind": "ntk", "factor": 4.0},
    "ntk-mixed": {"kind": "ntk-mixed", "factor": 4.0, "mixed_exponent": 0.75},
    "yarn turns": {"kind": "yarn", "factor": 4.0, "trained_length": 400},
    "yarn index": {"kind": "yarn", "factor": 4.0, "trained_length": 400, "yarn_ramp": "index"},
    "yarn log n": {"kind": "yarn", "factor": 4.0, "log_n": "trained"},
    "yarn betas": {"kind": "yarn", "factor": 4.0, "trained_length": 400, "beta_fast": 9.0, "beta_slow": 2.0},
    "yarn whole": {
        "kind": "yarn",
        "factor": 4.0,
        "trained_length": 400,
        "yarn_ramp": "index",
        "yarn_truncate": False,
        "beta_fast": 9.0,
        "beta_slow": 2.0,
        "attention_factor": 1.4,
        "rotated_factor": 0.8,
    },
    "yarn windowed base": {"kind": "yarn", "factor": 4.0, "rotated_factor": 1.3, "windowed_rope_theta": 50.0},
    "llama3": {"kind": "llama3", "factor": 8.0, "trained_length": 60, "rope_theta": 500.0},
    "llama3 own factors": {
        "kind": "llama3",
        "factor": 8.0,
        "trained_length": 60,
        "rope_theta": 300.0,
        "low_freq_factor": 2.0,
        "high_freq_factor": 3.0,
    },
    "rerope windowed base": {"kind": "rerope", "window": 6, "log_n": "trained", "windowed_rope_theta": 50.0},
    "none windowed base": {"kind": "none", "windowed_rope_theta": 50.0},
    "rerope": {"kind": "rerope", "window": 6},
    "rerope beyond": {"kind": "rerope", "window": 60},
    "rerope log n": {"kind": "rerope", "window": 6, "log_n": "inference", "trained_length": 9},
    "leaky": {"kind": "leaky-rerope", "window": 6, "leak": 8.0, "log_n": "trained"},
    "inverse": {"kind": "leaky-rerope", "window": 6, "leak": 0.125},
}
CASES = [
    *((model, "rope", False) for model in MODELS),
    *(("gqa", position, False) for position in POSITIONS if position != "rope" and "windowed base" not in position),
    *(
        ("mla with query latent", position, True)
        for position in ("pi", "yarn log n", "yarn whole", "llama3", "rerope log n", "inverse", "none")
    ),
    *(("gqa", position, True) for position in ("rope", "yarn turns", "rerope log n", "leaky")),
    *(
        (model, position, True)
        for model in ("hwfa2", "hwfa", "mla, windowed")
        for position in ("yarn windowed base", "rerope windowed base", "none windowed base")
    ),
    *(
        (model, position, True)
        for model in ("first unrotated", "windowed, last unrotated", "hwfa2, ends unrotated", "mla, first unrotated")
        for position in ("yarn whole", "yarn log n", "rerope log n")
    ),
    *(("windowed, last unrotated", position, False) for position in ("yarn windowed base", "rerope windowed base")),
    *(("hwfa2", position, True) for position in ("rerope", "leaky", "pi", "rerope log n")),
    *(("hwfa", position, True) for position in ("rerope log n", "leaky")),
    ("windowed", "none", True),
    ("rms", "rerope", False),
    ("key-l2", "inverse", True),
]


def case(model: str, position: str) -> RunConfig:
    """The configuration of a row of the table."""
    return configured(model={**SIZES, **MODELS[model]}, position=POSITIONS[position])


def shaken(config: RunConfig) -> dict[str, Tensor]:
    """Initial weights with gains that differ from 1, and zeros (residual_init) that differ from 0."""
    generator = torch.Generator().manual_seed(7)
    found = initial_weights(config)
    for name, weight in found.items():
        if kind(name) == "gain" or not weight.any():
            weight += 0.3 * torch.randn(weight.shape, generator=generator)
    return found


def far(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over that of the wanted tensor."""
    return ((got.double() - want.double()).norm() / want.double().norm()).item()
