"""Logits and gradients of networks that transformers has, from its own weights: whole, and split over two ranks."""

from typing import Any

import pytest
import torch

from model.config import ModelConfig
from model.decoder import Decoder
from model.parallel.layers import Kit, serial_kit
from model.parallel.mesh import make_kit, make_mesh
from model.parameters import local_slice
from model.positions.config import PositionConfig
from tests.model.huggingface.stock import SIZES, Case, stock_model
from tests.ranks import run_ranks

ROPE = {"rope_type": "default", "rope_theta": 5e3}
QWEN_3 = {"qk_norm": "rms", "head_dim": 16, "attention_bias": "all", "tied_head": "plain"}
OLMO_2 = {"norm_placement": "post", "qk_norm": "rms-all-heads", "tie_word_embeddings": False}
GEMMA_3 = {
    "norm_placement": "sandwich", "zero_centered_gains": True, "qk_norm": "rms", "scale_embedding": True, "head_dim": 24,
    "query_pre_attn_scalar": 20, "feed_forward": "geglu", "tied_head": "plain", "sliding_window": 12,
    "full_attention_layers": [2],
}  # fmt: skip
FAMILIES: dict[str, tuple[Case, dict[str, Any], dict[str, Any]]] = {
    "qwen 2": (Case("qwen2", "plain"), {}, {"attention_bias": "qkv", "tie_word_embeddings": False}),
    "llama with biases": (
        Case("llama", "biases"), {}, {"attention_bias": "all", "mlp_bias": True, "tie_word_embeddings": False},
    ),
    "smollm 3 with biases": (
        Case("smollm3", "biases, own layers"), {"no_rope_layers": [1, 1, 1, 1]},
        {"attention_bias": "all", "mlp_bias": True, "tie_word_embeddings": False},
    ),
    "qwen 3 with biases": (Case("qwen3", "tied, biases"), {}, QWEN_3),
    "olmo 2": (Case("olmo2", "plain"), {}, OLMO_2),
    "olmo 2 with biases": (
        Case("olmo2", "tied, biases"), {},
        {**OLMO_2, "attention_bias": "all", "tie_word_embeddings": True, "tied_head": "plain"},
    ),
    "olmo 2 with one kv head": (
        Case("olmo2", "one kv head"), {"rope_parameters": ROPE}, {**OLMO_2, "num_key_value_heads": 1},
    ),
    "gemma 3": (
        Case("gemma3_text", "plain"), {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}}, GEMMA_3,
    ),
}  # fmt: skip
"""Name -> transformers' model, what is changed in its configuration, and the keys of [model]."""
OWN = (*(key for key in SIZES if key in ModelConfig.model_fields),)


def stock_and_ours(name: str, kit: Kit) -> tuple[Any, Decoder]:
    """Both in float64, ours with this rank's slices of transformers' weights."""
    case, changes, keys = FAMILIES[name]
    stock = stock_model(case, **changes).double()
    values = {key: SIZES[key] for key in OWN} | {"tie_word_embeddings": True} | keys
    config = ModelConfig(**values)
    theta = stock.config.rope_parameters
    ours = Decoder(config, PositionConfig(rope_theta=theta.get("full_attention", theta)["rope_theta"]), 128, kit)
    weights = dict(stock.named_parameters())
    assert weights.keys() == dict(ours.named_parameters()).keys()
    with torch.no_grad():
        for key, parameter in ours.named_parameters():
            parameter.copy_(local(parameter, weights[key], kit))
    return stock, ours


def local(parameter: Any, full: torch.Tensor, kit: Kit) -> torch.Tensor:
    """This rank's slice of a full tensor."""
    for dimension, (length, start) in enumerate(zip(*local_slice(parameter.spec, kit.size, kit.rank), strict=True)):
        full = full.narrow(dimension, start, length)
    return full


def compare(name: str, kit: Kit) -> None:
    """Logits and the gradient of every weight, relative to the largest element of each."""
    stock, ours = stock_and_ours(name, kit)
    # without id 0, the padding of some, for whose row transformers drops the gradient
    tokens_BS = torch.randint(1, 96, (2, 41), generator=torch.Generator().manual_seed(1))
    logits = stock(tokens_BS[:, :-1], use_cache=False).logits
    with torch.no_grad():
        assert_same(f"{name}: logits", ours(tokens_BS[:, :-1]), logits)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens_BS[:, 1:].flatten(), reduction="sum").backward()
    loss, _ = ours(tokens_BS[:, :-1], tokens_BS[:, 1:])
    loss.backward()
    theirs = dict(stock.named_parameters())
    for key, parameter in ours.named_parameters():
        assert parameter.grad is not None, key
        assert_same(f"{name}: {key}", parameter.grad, local(parameter, theirs[key].grad, kit))  # type: ignore[arg-type]


def assert_same(what: str, got: torch.Tensor, want: torch.Tensor) -> None:
    """transformers norms, rotates and attends in float32 whatever the weights are in."""
    error = ((got - want).abs().max() / want.abs().max()).item()
    assert error < 1e-5, f"{what}: {error:.1e}"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_network_is_transformers(name: str):
    compare(name, serial_kit(torch.float64))


def compare_on_two_ranks(rank: int, world_size: int, sequence_parallel: bool) -> None:
    mesh = make_mesh(world_size, torch.device("cpu"))
    for name in FAMILIES:
        compare(name, make_kit(mesh, sequence_parallel, torch.float64))


@pytest.mark.slow
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_ranks_that_share_a_network_are_transformers(sequence_parallel: bool):
    run_ranks(compare_on_two_ranks, 2, sequence_parallel)
