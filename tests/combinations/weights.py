"""The parameters a configuration describes: names as in a checkpoint, full shapes, initial values, Tiger's least RMS.

Nothing of model/ or trainer/ is imported here or in the files beside it: a RunConfig is handed in and its fields are read.
"""

import math
import zlib
from typing import Any

import torch
from torch import Tensor

Weights = dict[str, Tensor]
FLOOR_SHARE = 0.1
"""Least RMS of a tensor, as a share of the deviation it was initialised with."""


def shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Full shape of every parameter by name, in the order of the network."""
    model = config.model
    D, V = model.hidden_size, model.vocab_size
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D)}
    for layer in range(model.num_hidden_layers):
        inside: dict[str, tuple[int, ...]] = {**_attention(model), "post_attention_layernorm": (D,)}
        if model.norm_placement != "post":
            inside = {"input_layernorm": (D,), **inside}
        if model.norm_placement == "sandwich":
            inside["pre_feedforward_layernorm"] = (D,)
        inside |= _experts(model) if has_experts(model, layer) else _mlp(model, "mlp", model.intermediate_size)
        if model.norm_placement != "pre":
            inside["post_feedforward_layernorm"] = (D,)
        for name, shape in inside.items():
            found[f"model.layers.{layer}.{name}.weight"] = shape
            if name in biased(model):
                found[f"model.layers.{layer}.{name}.bias"] = shape[:1]
    found["model.norm.weight"] = (D,)
    if not model.tie_word_embeddings:
        found["lm_head.weight"] = (V, D)
    elif model.tied_head == "projection":
        found["lm_head.projection.weight"] = (D, D)
    return found


def head_size(model: Any) -> int:
    """Channels of a query head under grouped-query attention."""
    return model.head_dim or model.hidden_size // model.num_attention_heads


def _attention(model: Any) -> dict[str, tuple[int, ...]]:
    D, N = model.hidden_size, model.num_attention_heads
    if model.attention == "gqa":
        H, K = head_size(model), model.num_key_value_heads or N
        found = {"q_proj": (N * H, D), "k_proj": (K * H, D), "v_proj": (K * H, D), "o_proj": (D, N * H)}
        norms = {"rms": {"q_norm": (H,), "k_norm": (H,)}, "rms-all-heads": {"q_norm": (N * H,), "k_norm": (K * H,)}}
        norms = norms.get(model.qk_norm, {})
        return {f"self_attn.{name}": shape for name, shape in (found | norms).items()}
    nope, rope, value, rank = model.qk_nope_head_dim, model.qk_rope_head_dim, model.v_head_dim, model.kv_lora_rank
    if model.q_lora_rank is None:
        found = {"q_proj": (N * (nope + rope), D)}
    else:
        low = model.q_lora_rank
        found = {"q_a_proj": (low, D), "q_a_layernorm": (low,), "q_b_proj": (N * (nope + rope), low)}
    found |= {"kv_a_proj_with_mqa": (rank + rope, D), "kv_a_layernorm": (rank,)}
    found |= {"kv_b_proj": (N * (nope + value), rank), "o_proj": (D, N * value)}
    return {f"self_attn.{name}": shape for name, shape in found.items()}


def _mlp(model: Any, name: str, width: int) -> dict[str, tuple[int, ...]]:
    D, F = model.hidden_size, width
    return {f"{name}.gate_proj": (F, D), f"{name}.up_proj": (F, D), f"{name}.down_proj": (D, F)}


def has_experts(model: Any, layer: int) -> bool:
    """Whether a layer is a mixture of experts."""
    return model.feed_forward == "moe" and layer >= model.first_k_dense_replace


def _experts(model: Any) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"mlp.gate": (model.n_routed_experts, model.hidden_size)}
    routed = [_mlp(model, f"mlp.experts.{e}", model.moe_intermediate_size) for e in range(model.n_routed_experts)]
    for alike in zip(*(one.items() for one in routed), strict=True):  # the same matrix of all experts, then the next one
        found |= dict(alike)
    if model.n_shared_experts:
        found |= _mlp(model, "mlp.shared_experts", model.n_shared_experts * model.moe_intermediate_size)
    return found


ROUTER_BIAS = "e_score_correction_bias"


def router_biases(config: Any) -> dict[str, Tensor]:
    """What the biases of the routers are at first, by name: no parameters, though checkpoints have them; never narrow."""
    model = config.model
    layers = [layer for layer in range(model.num_hidden_layers) if has_experts(model, layer) and model.router_bias]
    return {f"model.layers.{layer}.mlp.gate.{ROUTER_BIAS}": torch.zeros(model.n_routed_experts) for layer in layers}


def biased(model: Any) -> list[str]:
    """Matrices of a block that have a bias."""
    attention = {"none": "", "qkv": "qkv", "all": "qkvo"}[model.attention_bias]
    mlp = ("gate", "up", "down") if model.mlp_bias else ()
    return [*(f"self_attn.{name}_proj" for name in attention), *(f"mlp.{name}_proj" for name in mlp)]


def kind(name: str) -> str:
    """matrix, expert, embedding, head, gain or bias."""
    if name.endswith(".bias"):
        return "bias"
    if name == "model.embed_tokens.weight":
        return "embedding"
    if name.startswith("lm_head."):
        return "head"
    if ".mlp.experts." in name:
        return "expert"
    return "gain" if "norm" in name else "matrix"


MATRICES = ("matrix", "expert")
"""Kinds of matrices between two activations."""
VECTORS = ("gain", "bias")
"""Kinds of one dimension: all elements start alike, and weight decay leaves them out."""


def centre(config: Any, name: str) -> float:
    """Where the elements of a parameter start, or the mean of what they are drawn from."""
    return 1.0 if kind(name) == "gain" and not config.model.zero_centered_gains else 0.0


def deviation(config: Any, name: str, residual_init: str) -> float:
    """Standard deviation of a matrix's initial elements; of an orthogonal one, the root of their mean square."""
    model = config.model
    if name == "lm_head.projection.weight":
        return 1 / math.sqrt(model.hidden_size)
    if kind(name) == "embedding" and model.tie_word_embeddings and model.tied_head == "small-init":
        return math.log(model.vocab_size) / model.hidden_size
    if "o_proj" in name or "down_proj" in name:
        share = {"scaled": 1 / math.sqrt(2 * model.num_hidden_layers), "plain": 1.0, "zero": 0.0}[residual_init]
        return model.initializer_range * share
    return model.initializer_range


def initial_weights(config: Any) -> dict[str, Tensor]:
    """float32 tensors by name, drawn on the CPU: elements of a tensor follow from run.seed and its name.

    With train.precision = "bf16" they are rounded to bfloat16: the network holds them so before any master is made.
    """
    found = {}
    for name, shape in shapes(config).items():
        if kind(name) in VECTORS:
            found[name] = torch.full(shape, centre(config, name))
            continue
        generator = torch.Generator().manual_seed(zlib.crc32(f"{config.run.seed}/{name}".encode()))
        normal = torch.randn(shape, generator=generator)
        if name == "lm_head.projection.weight":
            found[name] = torch.linalg.qr(normal)[0]
        else:
            found[name] = normal * deviation(config, name, config.model.residual_init)
    if config.train.precision == "bf16":
        return {name: weight.bfloat16().float() for name, weight in found.items()}
    return found


def floors(config: Any) -> dict[str, float]:
    """Least RMS by which Tiger's rate of a matrix or of the embedding is scaled, by name.

    optimizer.tiger.rms_floor if set; else a tenth of the initial deviation, of a tensor of zeros the one that
    residual_init = "scaled" would have drawn it with.
    """
    found = {}
    for name in shapes(config):
        if kind(name) not in VECTORS:
            drawn = deviation(config, name, config.model.residual_init) or deviation(config, name, "scaled")
            found[name] = config.optimizer.tiger.rms_floor or FLOOR_SHARE * drawn
    return found
