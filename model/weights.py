"""tiglon's weights and configuration in Hugging Face's terms, and back.

Names are Hugging Face's already (Llama's, DeepSeek's for latent attention), so what remains is the output head, the
configuration, and saying what has no stock architecture.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.config import ModelConfig, PositionConfig
from model.decoder import Decoder
from model.layers import serial

LATENT_EPS = 1e-6
"""What transformers' DeepSeek-V3 adds in the norms of its latents, whatever its configuration says."""


@dataclass(frozen=True)
class Outgoing:
    """One tensor of an exported model: made of the tensors `parts`, which are in this order its arguments."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    make: Callable[..., Tensor]


def shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter of the network: name -> full shape."""
    with torch.device("meta"):
        network = Decoder(model, PositionConfig.model_validate({}), 1, serial())
    return {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}


def outgoing(model: ModelConfig) -> list[Outgoing]:
    """The tensors of the exported model.

    A tied head that stock architectures do not know becomes an untied one with the same logits: the half-swap of the
    hidden state moves into the rows of the head, a projection is multiplied into them (kexue 9698).
    """
    own = shapes(model)
    found = [Outgoing(name, shape, (name,), _same) for name, shape in own.items() if name != "lm_head.projection.weight"]
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    if not model.tie_word_embeddings:
        return found
    match model.tied_head:
        case "plain" | "small-init":
            return found
        case "half-swap":
            return [*found, Outgoing(head, own[embedding], (embedding,), swap_halves)]
        case "projection":
            return [*found, Outgoing(head, own[embedding], (embedding, "lm_head.projection.weight"), _project)]
        case _:
            raise ValueError(f"model.tied_head = '{model.tied_head}'; legal: half-swap, plain, projection, small-init")


def _same(value: Tensor) -> Tensor:
    return value


def swap_halves(weight_VD: Tensor) -> Tensor:
    """Exchange the halves of every row: W' h = W swap(h)."""
    return torch.cat(weight_VD.chunk(2, dim=-1)[::-1], dim=-1)


def _project(weight_VD: Tensor, projection_DD: Tensor) -> Tensor:
    """W' h = W (P h), in float32."""
    return (weight_VD.float() @ projection_DD.float()).to(weight_VD.dtype)


def exported_config(
    model: ModelConfig, position: PositionConfig, trained_length: int, end_of_text: int | None, dtype: str, lossy: bool
) -> tuple[dict[str, Any], list[str]]:
    """config.json for the network, and a sentence for everything that is lost.

    Args:
        trained_length: tokens.
        dtype: of the exported weights, "float32" or "bfloat16".
        lossy: export with losses; otherwise they are refused.

    Raises:
        ValueError: something has no stock architecture and `lossy` is not set, or is lost beyond use.
    """
    if model.qk_norm == "key-l2":
        raise ValueError("qk_norm = 'key-l2' has no stock architecture: its scores need normalised keys, nothing else will do")
    rope, read_length, lost = _exported_position(model, position, trained_length)
    architecture, special = _architecture(model, lost)
    if lost and not lossy:
        raise ValueError(f"the export would lose something: {'; '.join(lost)}; export with --lossy to accept that")
    tied = model.tie_word_embeddings and model.tied_head in ("plain", "small-init")
    config = {
        "architectures": [f"{architecture}ForCausalLM"],
        "model_type": {"Llama": "llama", "Qwen3": "qwen3", "DeepseekV3": "deepseek_v3", "Mistral": "mistral"}[architecture],
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_hidden_layers,
        "num_attention_heads": model.num_attention_heads,
        "hidden_act": "silu",
        "rms_norm_eps": model.rms_norm_eps,
        "initializer_range": model.initializer_range,
        "tie_word_embeddings": tied,
        "attention_bias": False,
        "max_position_embeddings": read_length,
        "rope_theta": rope["rope_theta"],
        "rope_parameters": rope,
        "bos_token_id": None,
        "eos_token_id": end_of_text,
        "pad_token_id": None,
        "dtype": dtype,
        **special,
    }
    return config, lost


def _exported_position(model: ModelConfig, position: PositionConfig, trained: int) -> tuple[dict[str, Any], int, list[str]]:
    """rope_parameters, readable length (tokens), what is lost."""
    trained = position.trained_length or trained
    theta, size, lost = position.rope_theta, model.rotary_size, []
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    length = int(trained * position.factor)
    match position.kind:
        case "rope":
            pass
        case "pi":
            rope = {"rope_type": "linear", "rope_theta": theta, "factor": position.factor}
        case "ntk":
            rope["rope_theta"] = theta * position.factor ** (size / max(size - 2, 1))
        case "yarn" if position.yarn_ramp == "index" and model.attention == "gqa":
            rope = {
                "rope_type": "yarn", "rope_theta": theta, "factor": position.factor, "beta_fast": 32.0, "beta_slow": 1.0,
                "original_max_position_embeddings": trained,
            }  # fmt: skip
        case "rerope" | "leaky-rerope":
            lost.append(
                f"position.kind = '{position.kind}' is read as plain RoPE: distances from {position.window} tokens on differ"
            )
        case _:
            raise ValueError(
                f"position.kind = '{position.kind}' has no stock architecture here; "
                "those that have: rope, pi, ntk, yarn (yarn_ramp = 'index', attention = 'gqa')"
            )
    if position.log_n == "trained":
        lost.append("the log n scale of the queries, which the model was trained with, is left out")
    if position.log_n == "inference":
        lost.append(f"the log n scale of the queries is left out: positions from {trained} tokens on differ")
    return rope, length, lost


def _architecture(model: ModelConfig, lost: list[str]) -> tuple[str, dict[str, Any]]:
    """The stock architecture that computes the same, and its own configuration keys; adds to `lost`."""
    kv = {"num_key_value_heads": model.kv_heads, "head_dim": model.head_size}
    if model.attention == "mla":
        return "DeepseekV3", _latent(model, lost)
    windowed = [not model.full_layer(layer) for layer in range(model.num_hidden_layers)]
    if any(windowed) and not all(windowed) and model.full_attention_position == "none":
        raise ValueError("full_attention_position = 'none' has no stock architecture: they turn every layer alike")
    if model.qk_norm == "rms":
        types = ["sliding_attention" if window else "full_attention" for window in windowed]
        own = {"use_sliding_window": any(windowed), "sliding_window": model.sliding_window, "layer_types": types}
        return "Qwen3", {**kv, **own}
    if any(windowed):
        if not all(windowed):
            raise ValueError("sliding_window in some layers only needs qk_norm = 'rms' (Qwen3) to have a stock architecture")
        return "Mistral", {**kv, "sliding_window": model.sliding_window}
    if model.hidden_size % model.num_attention_heads:
        raise ValueError(
            f"hidden_size = {model.hidden_size} is no multiple of num_attention_heads = {model.num_attention_heads}: "
            "transformers' Llama refuses that"
        )
    return "Llama", {**kv, "mlp_bias": False}


def _latent(model: ModelConfig, lost: list[str]) -> dict[str, Any]:
    if model.sliding_window is not None:
        raise ValueError("attention = 'mla' with sliding_window has no stock architecture")
    if model.rms_norm_eps != LATENT_EPS:
        lost.append(
            f"transformers adds {LATENT_EPS:g} in the norms of the latents, the model was trained with {model.rms_norm_eps:g}"
        )
    return {
        "num_key_value_heads": model.num_attention_heads,
        "q_lora_rank": model.q_lora_rank,
        "kv_lora_rank": model.kv_lora_rank,
        "qk_nope_head_dim": model.qk_nope_head_dim,
        "qk_rope_head_dim": model.qk_rope_head_dim,
        "v_head_dim": model.v_head_dim,
        "rope_interleave": True,
        "first_k_dense_replace": model.num_hidden_layers,  # every layer dense
        "n_routed_experts": 1,
        "num_nextn_predict_layers": 0,
    }


_COMMON: dict[str, Any] = {
    "vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "hidden_act": "silu",
    "initializer_range": 0.02, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
}  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {**_COMMON, "intermediate_size": 11008, "max_position_embeddings": 2048},
    "MistralForCausalLM": {
        **_COMMON, "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "Qwen3ForCausalLM": {
        **_COMMON, "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "head_dim": 128,
        "max_position_embeddings": 32768, "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28,
    },
    "DeepseekV3ForCausalLM": {
        **_COMMON, "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 61,
        "num_attention_heads": 128, "max_position_embeddings": 4096, "first_k_dense_replace": 3, "rope_interleave": True,
        "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    },
}  # fmt: skip
"""Architectures that can be imported, and what transformers' configuration classes say of a key that a file leaves out."""


def _wanted(config: dict[str, Any], key: str, where: str) -> Any:
    """A number. Raises ValueError for a key that is not there and has no default, or holds something else."""
    value = config.get(key)
    if value is None:
        raise ValueError(f"{where} has no {key}; add it, as the model was trained")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where} has {key} = {value!r}, which is no number; correct it")
    return value


def imported_config(config: dict[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any], int]:
    """[model] and [position] for a Hugging Face configuration, and its length in tokens.

    Raises:
        ValueError: when the network is none that tiglon computes; `where` names the file.
    """
    named = {kind.removesuffix("ForCausalLM").lower(): kind for kind in DEFAULTS}
    by_type = named.get(str(config.get("model_type")).replace("_", ""), "none")
    architecture = (config.get("architectures") or [by_type])[0]
    if architecture not in DEFAULTS:
        raise ValueError(f"{where} is a {architecture}; those that can be imported: {', '.join(sorted(DEFAULTS))}")
    config = {**DEFAULTS[architecture], **config}
    for key, wanted in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu")):
        if config.get(key, wanted) not in (wanted, None):
            raise ValueError(f"{where} has {key} = {config[key]}, tiglon's networks have {wanted}")
    model = {key: _wanted(config, key, where) for key in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps",
        "initializer_range",
    )}  # fmt: skip
    model |= {"tie_word_embeddings": bool(config.get("tie_word_embeddings")), "tied_head": "plain"}
    model |= _imported_attention(config, architecture, where)
    position, trained = _imported_position(config, where)
    return model, position, trained


def _imported_attention(config: dict[str, Any], architecture: str, where: str) -> dict[str, Any]:
    if architecture == "DeepseekV3ForCausalLM":
        if (config["first_k_dense_replace"] or 0) < config["num_hidden_layers"]:
            raise ValueError(f"{where} has mixture-of-experts layers; tiglon's networks are dense")
        if not config["rope_interleave"]:
            raise ValueError(f"{where} has rope_interleave = false; tiglon turns latent attention in interleaved pairs")
        if config["rms_norm_eps"] != LATENT_EPS:
            raise ValueError(f"{where} has rms_norm_eps = {config['rms_norm_eps']} beside latents normed with {LATENT_EPS:g}")
        names = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        return {"attention": "mla", **{name: config[name] for name in names if config.get(name) is not None}}
    found = {"num_key_value_heads": config.get("num_key_value_heads") or config["num_attention_heads"]}
    if config.get("head_dim"):
        found["head_dim"] = config["head_dim"]
    if architecture == "Qwen3ForCausalLM":
        found["qk_norm"] = "rms"
        if config.get("use_sliding_window") and config.get("sliding_window"):
            layers, first = range(config["num_hidden_layers"]), config["max_window_layers"]
            types = config.get("layer_types") or ["full_attention" if layer < first else "sliding" for layer in layers]
            full = [layer for layer, kind in enumerate(types) if kind == "full_attention"]
            if len(full) < len(layers):
                found |= {"sliding_window": config["sliding_window"], "full_attention_layers": full}
    if architecture == "MistralForCausalLM" and config.get("sliding_window"):
        found["sliding_window"] = config["sliding_window"]
    return found


def _imported_position(config: dict[str, Any], where: str) -> tuple[dict[str, Any], int]:
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    length = _wanted(config, "max_position_embeddings", where)
    kind = rope.get("rope_type", rope.get("type", "default"))
    factor = _wanted(rope, "factor", f"{where}: rope_parameters") if kind in ("linear", "yarn") else 1.0
    match kind:
        case "default":
            return {"kind": "rope", "rope_theta": theta}, length
        case "linear":
            return {"kind": "pi", "rope_theta": theta, "factor": factor}, int(length / factor)
        case "yarn" if (rope.get("beta_fast", 32), rope.get("beta_slow", 1), rope.get("truncate", True)) == (32, 1, True):
            trained = rope.get("original_max_position_embeddings", int(length / factor))
            own = {"factor": factor, "yarn_ramp": "index", "trained_length": trained}
            return {"kind": "yarn", "rope_theta": theta, **own}, trained
        case _:
            raise ValueError(
                f"{where} has rope_type = '{kind}' with {rope}; tiglon reads default, linear, and yarn with beta 32 and 1"
            )
