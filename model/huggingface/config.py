"""Hugging Face's config.json, from tiglon's configuration and back."""

from typing import Any

from model.config import ModelConfig
from model.positions.config import POSITION_MAPS, PositionConfig

LATENT_EPS = 1e-6
"""Epsilon of the latents' norms in transformers' DeepSeek-V3, whatever its configuration says."""

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
"""Architectures that can be imported, and the defaults of transformers' configuration classes of keys a file leaves out."""


def exported_config(
    model: ModelConfig, position: PositionConfig, trained_length: int, end_of_text: int | None, dtype: str, lossy: bool
) -> tuple[dict[str, Any], list[str]]:
    """config.json for the network, and a sentence for everything that is lost.

    Args:
        trained_length: tokens.
        dtype: of the exported weights, "float32" or "bfloat16".
        lossy: export although something is lost; otherwise it is refused.

    Raises:
        ValueError: something has no stock architecture and `lossy` is not set, or no stock architecture comes near.
    """
    if model.qk_norm == "key-l2":
        raise ValueError("qk_norm = 'key-l2' has no stock architecture: its scores need normalised keys, nothing else will do")
    rope, max_length, lost = _exported_position(model, position, trained_length)
    architecture, model_type, special = _architecture(model, lost)
    if lost and not lossy:
        raise ValueError(f"the export would lose something: {'; '.join(lost)}; export with --lossy to accept that")
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = {
        "architectures": [f"{architecture}ForCausalLM"],
        "model_type": model_type,
        **{name: getattr(model, name) for name in sizes},
        "hidden_act": "silu",
        "rms_norm_eps": model.rms_norm_eps,
        "initializer_range": model.initializer_range,
        "tie_word_embeddings": model.tie_word_embeddings and model.tied_head in ("plain", "small-init"),
        "attention_bias": False,
        "max_position_embeddings": max_length,
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
    """rope_parameters, the largest usable length (tokens), and a sentence for everything that is lost."""
    trained = position.trained_length or trained
    rope = position.map.rope_parameters(model.attention, model.rotary_size, trained)
    if rope is None:
        stock = {kind: made.stock for kind, made in POSITION_MAPS.items() if made.stock is not None}
        names = (kind + (f" ({condition})" if condition else "") for kind, condition in stock.items())
        raise ValueError(
            f"position.kind = '{position.kind}' has no stock architecture here; those that have: {', '.join(names)}"
        )
    lost = [f"position.kind = '{position.kind}' {what}"] if (what := position.map.lost()) else []
    if position.log_n == "trained":
        lost.append("the log n scale of the queries, which the model was trained with, is left out")
    if position.log_n == "inference":
        lost.append(f"the log n scale of the queries is left out: positions from {trained} tokens on differ")
    return rope, int(trained * position.map.length_factor()), lost


def _architecture(model: ModelConfig, lost: list[str]) -> tuple[str, str, dict[str, Any]]:
    """The stock architecture that computes the same, its model_type and its own configuration keys; adds to `lost`."""
    if model.feed_forward != "swiglu":
        raise ValueError(f"feed_forward = '{model.feed_forward}' has no stock architecture here; those that have: swiglu")
    match model.attention:
        case "gqa":
            return _grouped_query_attention(model)
        case "mla":
            return "DeepseekV3", "deepseek_v3", _latent_attention(model, lost)
        case _:
            raise ValueError(f"attention = '{model.attention}' has no stock architecture here; those that have: gqa, mla")


def _grouped_query_attention(model: ModelConfig) -> tuple[str, str, dict[str, Any]]:
    kv = {"num_key_value_heads": model.kv_heads, "head_dim": model.head_size}
    windowed = [not model.full_layer(layer) for layer in range(model.num_hidden_layers)]
    if any(windowed) and not all(windowed) and model.full_attention_position == "none":
        raise ValueError("full_attention_position = 'none' has no stock architecture: they rotate every layer alike")
    if model.qk_norm == "rms":
        types = ["sliding_attention" if window else "full_attention" for window in windowed]
        window = {"use_sliding_window": any(windowed), "sliding_window": model.sliding_window, "layer_types": types}
        return "Qwen3", "qwen3", {**kv, **window}
    if any(windowed):
        if not all(windowed):
            raise ValueError("sliding_window in some layers only needs qk_norm = 'rms' (Qwen3) to have a stock architecture")
        return "Mistral", "mistral", {**kv, "sliding_window": model.sliding_window}
    if model.hidden_size % model.num_attention_heads:
        raise ValueError(
            f"hidden_size = {model.hidden_size} is no multiple of num_attention_heads = {model.num_attention_heads}: "
            "transformers' Llama refuses that"
        )
    return "Llama", "llama", {**kv, "mlp_bias": False}


def _latent_attention(model: ModelConfig, lost: list[str]) -> dict[str, Any]:
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


def _required_number(config: dict[str, Any], key: str, where: str) -> Any:
    """The number under a key. Raises ValueError for a key that is missing and has no default, or holds something else."""
    value = config.get(key)
    if value is None:
        raise ValueError(f"{where} has no {key}; add it, as the model was trained")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where} has {key} = {value!r}, which is no number; correct it")
    return value


def imported_config(config: dict[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any], int]:
    """[model] and [position] for a Hugging Face configuration, and its trained length in tokens.

    Raises:
        ValueError: tiglon cannot compute the network; `where` names the file.
    """
    by_model_type = {kind.removesuffix("ForCausalLM").lower(): kind for kind in DEFAULTS}
    kind = config.get("model_type")
    architecture = (config.get("architectures") or [by_model_type.get(str(kind).replace("_", ""), kind)])[0]
    if architecture not in DEFAULTS:
        fault = "names neither architectures nor model_type" if architecture is None else f"is a {architecture}"
        raise ValueError(f"{where} {fault}; those that can be imported: {', '.join(sorted(DEFAULTS))}")
    config = {**DEFAULTS[architecture], **config}
    activation = DEFAULTS[architecture]["hidden_act"]
    for key, wanted in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", activation)):
        if config.get(key, wanted) not in (wanted, None):
            raise ValueError(f"{where} has {key} = {config[key]}, tiglon's networks have {wanted}")
    model = {key: _required_number(config, key, where) for key in (
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
            raise ValueError(f"{where} has rope_interleave = false; tiglon rotates latent attention in interleaved pairs")
        if config["rms_norm_eps"] != LATENT_EPS:
            raise ValueError(f"{where} has rms_norm_eps = {config['rms_norm_eps']} beside latents normed with {LATENT_EPS:g}")
        names = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        return {"attention": "mla", **{name: config[name] for name in names if config.get(name) is not None}}
    attention = {"num_key_value_heads": config.get("num_key_value_heads") or config["num_attention_heads"]}
    if config.get("head_dim"):
        attention["head_dim"] = config["head_dim"]
    if architecture == "Qwen3ForCausalLM":
        attention["qk_norm"] = "rms"
        if config.get("use_sliding_window") and config.get("sliding_window"):
            layers, first = range(config["num_hidden_layers"]), config["max_window_layers"]
            types = config.get("layer_types") or ["full_attention" if layer < first else "sliding" for layer in layers]
            full = [layer for layer, kind in enumerate(types) if kind == "full_attention"]
            if len(full) < len(layers):
                attention |= {"sliding_window": config["sliding_window"], "full_attention_layers": full}
    if architecture == "MistralForCausalLM" and config.get("sliding_window"):
        attention["sliding_window"] = config["sliding_window"]
    return attention


def _imported_position(config: dict[str, Any], where: str) -> tuple[dict[str, Any], int]:
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    length = _required_number(config, "max_position_embeddings", where)
    kind = rope.get("rope_type", rope.get("type", "default"))
    factor = _required_number(rope, "factor", f"{where}: rope_parameters") if kind in ("linear", "yarn") else 1.0
    match kind:
        case "default":
            return {"kind": "rope", "rope_theta": theta}, length
        case "linear":
            return {"kind": "pi", "rope_theta": theta, "factor": factor}, int(length / factor)
        case "yarn" if (rope.get("beta_fast", 32), rope.get("beta_slow", 1), rope.get("truncate", True)) == (32, 1, True):
            trained = rope.get("original_max_position_embeddings", int(length / factor))
            position = {"kind": "yarn", "rope_theta": theta, "factor": factor, "yarn_ramp": "index", "trained_length": trained}
            return position, trained
        case _:
            raise ValueError(
                f"{where} has rope_type = '{kind}' with {rope}; tiglon imports default, linear, and yarn with beta 32 and 1"
            )
