"""Bytes kept for the backward against what autograd saves and hand counts."""

import functools
import gc
import itertools
import shutil
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from launch.config import RunConfig
from launch.load_config import build_config
from launch.network import build_network
from model.activations import activations
from model.config import ModelConfig
from model.decoder import Decoder
from model.parallel.layers import serial_kit
from model.parallel.mesh import Mesh, make_kit, make_mesh
from model.positions.config import PositionConfig
from model.recompute import selective_contexts
from model.sublayer import Execution
from tests.model.networks import LLAMA_8B, NETWORKS
from tests.ranks import run_ranks


def kept_bytes(call: Callable[[], object], decoder: Decoder) -> int:
    """Bytes of what a forward keeps for its backward, parameters left out."""
    known = {value.untyped_storage().data_ptr() for value in decoder.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        call()
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize(
    ("name", "slack"),
    [
        ("gqa", 0.02), ("mha, untied, qk norm", 0.15), ("mla", 0.15),
        ("norms of outputs, all heads normed, biases", 0.15), ("norms on both sides, zero-centred, geglu", 0.15),
    ],
)  # fmt: skip
def test_activations_are_what_autograd_saves(name, slack):
    config = NETWORKS[name].model_copy(update={"num_hidden_layers": 6})
    decoder = Decoder(config, PositionConfig(), 64, serial_kit())
    tokens = torch.randint(96, (4, 64))
    measured = kept_bytes(lambda: decoder(tokens, tokens), decoder)
    head = 4 * (96 * 32 + 4 * 64 * 32)  # gradients of the head and the hidden states, computed in the forward
    assert activations(config, 4 * 64, 64, Execution(4, device="cpu")).kept == pytest.approx(measured - head, rel=slack)


COMPILED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gqa, two regions": ({"num_key_value_heads": 2}, {"kind": "leaky-rerope", "window": 16, "leak": 16.0}),
    "windows beside two regions": (
        {"num_key_value_heads": 2, "sliding_window": 16, "full_attention_layers": [0]}, {"kind": "rerope", "window": 16},
    ),
    "qk norm": ({"qk_norm": "rms"}, {}),
    "all heads normed, norms of outputs, biases": (
        {"qk_norm": "rms-all-heads", "norm_placement": "post", "attention_bias": "all", "mlp_bias": True}, {},
    ),
    "norms on both sides, zero-centred, geglu": (
        {"qk_norm": "rms", "norm_placement": "sandwich", "zero_centered_gains": True, "feed_forward": "geglu"}, {},
    ),
    "mla": (
        {"attention": "mla", "q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
         "v_head_dim": 16}, {},
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # of torch's compiler about itself
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_blocks_keep_what_is_counted(name, recompute, monkeypatch):
    # separates forward from backward as Inductor does, in a tenth of the time
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager_decomp_partition"))
    sizes, position = COMPILED[name]
    layer = []
    for layers in (1, 3):
        base = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4}
        train = {"sequence_length": 64, "micro_batch_size": 4, "compile": True}
        config = build_config({"model": base | sizes | {"num_hidden_layers": layers}, "position": position, "train": train})
        decoder, tokens = build_network(config, Mesh(), recompute), torch.randint(96, (4, 64))
        decoder(tokens, tokens)[0].backward()
        measured = kept_bytes(functools.partial(decoder, tokens, tokens), decoder)
        execution = Execution(2, recompute=recompute, device="cpu", compiled=True, regions=2 if position else 1)
        planned = activations(config.model, 4 * 64, 64, execution)
        layer.append((measured, planned.kept))
    measured, planned = (layer[1][i] - layer[0][i] for i in (0, 1))
    assert planned == pytest.approx(measured, rel=0.02)


EXPERTS = {
    "sigmoid": {},
    "softmax, none shared": {"scoring_func": "softmax", "n_shared_experts": 0, "norm_topk_prob": False},
    "groups, losses": {"n_group": 4, "topk_group": 2, "router_aux_loss_coef": 0.1, "router_z_loss_coef": 0.01},
}


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("name", EXPERTS)
def test_layers_with_experts_keep_what_is_counted(name: str, recompute: str, precision: str):
    held = []
    for layers in (1, 3):
        config = _with_experts(name, layers, {"precision": precision})
        decoder, tokens = build_network(config, Mesh(), recompute), torch.randint(96, (4, 64))
        decoder(tokens, tokens)[0].backward()
        measured = held_bytes(functools.partial(decoder, tokens, tokens), decoder)
        execution = Execution(2 if precision == "bf16" else 4, recompute=recompute, device="cpu")
        held.append((measured, activations(config.model, 4 * 64, 64, execution).kept))
    measured, planned = (held[1][i] - held[0][i] for i in (0, 1))
    assert planned == pytest.approx(measured, rel=0.005)  # the router's weight in float32 is not counted


def _with_experts(name: str, layers: int, train: dict[str, Any]) -> RunConfig:
    sizes = {
        "vocab_size": 96, "hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "feed_forward": "moe",
        "num_hidden_layers": layers, "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48,
    }  # fmt: skip
    return build_config({"model": sizes | EXPERTS[name], "train": {"sequence_length": 64, "micro_batch_size": 4} | train})


@pytest.mark.filterwarnings("ignore")  # of torch's compiler about itself
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.parametrize("name", ["sigmoid", "softmax, none shared"])
def test_compiled_layers_with_experts_keep_what_is_counted(name: str, recompute: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager_decomp_partition"))
    held = []
    for layers in (1, 3):
        torch._dynamo.reset()
        config = _with_experts(name, layers, {"compile": True})
        decoder, tokens = build_network(config, Mesh(), recompute), torch.randint(96, (4, 64))
        decoder(tokens, tokens)[0].backward()
        measured = kept_bytes(functools.partial(decoder, tokens, tokens), decoder)
        execution = Execution(2, recompute=recompute, device="cpu", compiled=True)
        held.append((measured, activations(config.model, 4 * 64, 64, execution).kept))
    measured, planned = (held[1][i] - held[0][i] for i in (0, 1))
    assert planned == pytest.approx(measured, rel=0.01)


def test_recomputed_experts_keep_their_tokens_alone():
    """Of 256 tokens, 3 copies each, in 2 layers: gate, silu, up, product and weighted product of 48 numbers are made again."""
    model = _with_experts("sigmoid", 2, {}).model
    none, experts = (activations(model, 256, 64, Execution(2, recompute=how)) for how in ("none", "experts"))
    inside = 256 * 3 * 5 * 48 * 2
    assert (none.kept - experts.kept, experts.recomputed) == (2 * inside, inside)


SHARED = {
    "gqa": {"num_key_value_heads": 4}, "mqa": {"num_key_value_heads": 1},
    "mla": {"attention": "mla", "q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
            "v_head_dim": 24},
}  # fmt: skip
REGIONS = {"one region": (640, {}), "two regions": (256, {"kind": "leaky-rerope", "window": 16, "leak": 8.0})}
"""Tokens of a sequence, and the map. On 640 tokens whole rows and late chunks have the kernels of long ones."""
RECOMPUTE = ("none", "selective", "full")


def _shared(kind: str, layers: int) -> ModelConfig:
    return ModelConfig(
        **{"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8} | SHARED[kind],
        num_hidden_layers=layers,
    )  # fmt: skip


def alive() -> dict[int, torch.Tensor]:
    """Every tensor that Python knows, by the address of its storage."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {x.untyped_storage().data_ptr(): x for x in gc.get_objects() if type(x) is torch.Tensor}


def held_bytes(call: Callable[[], object], decoder: Decoder) -> int:
    """As kept_bytes, and what eager selective recomputation keeps beside autograd."""
    kept, known = dict[int, torch.UntypedStorage](), alive()

    def keep(value: torch.Tensor) -> torch.Tensor:
        kept[value.untyped_storage().data_ptr()] = value.untyped_storage()
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        result = call()
    kept |= {address: value.untyped_storage() for address, value in alive().items()}
    without = {value.untyped_storage().data_ptr() for value in decoder.parameters()} | {*known}
    del result
    return sum(storage.nbytes() for address, storage in kept.items() if address not in without)


def _held_by_a_layer(rank: int, ranks: int, exchange: Any) -> dict[tuple[str, str, str], int]:
    """Bytes of a layer on this rank: those of three without those of one."""
    mesh, found = make_mesh(1, torch.device("cpu"), context_parallel_size=ranks), {}
    for kind, (regions, (length, position)), recompute in itertools.product(SHARED, REGIONS.items(), RECOMPUTE):
        held = []
        for layers in (1, 3):
            kit = make_kit(mesh, context_exchange=exchange)
            decoder = Decoder(_shared(kind, layers), PositionConfig(**position), length, kit)
            if recompute != "none":
                how = {"context_fn": selective_contexts} if recompute == "selective" else {}
                decoder.run_block = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False, **how)
            tokens = torch.randint(96, (2, length), generator=torch.Generator().manual_seed(0))
            decoder(tokens, tokens)
            # the least of three, since a thread of gloo may not have let go of a buffer yet
            held.append(min(held_bytes(functools.partial(decoder, tokens, tokens), decoder) for _ in range(3)))
        found[kind, regions, recompute] = held[1] - held[0]
    return found


@pytest.mark.parametrize("ranks", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("exchange", ["gather", "heads"])
def test_the_context_rank_that_holds_most_holds_what_is_counted(exchange: str, ranks: int):
    for (kind, regions, recompute), measured in _most(run_ranks(_held_by_a_layer, ranks, exchange)).items():
        length, position = REGIONS[regions]
        execution = Execution(
            4, recompute=recompute, device="cpu", regions=2 if position else 1, context_parallel_size=ranks,
            context_exchange=exchange,
        )  # fmt: skip
        one, three = (activations(_shared(kind, layers), 2 * length // ranks, length, execution).kept for layers in (1, 3))
        assert three - one == pytest.approx(measured, rel=0.06), (kind, regions, recompute)


def _held_compiled(rank: int, ranks: int, kinds: list[tuple[str, str, str, bool]]) -> dict[Any, int]:
    """The same of compiled blocks in bf16."""
    warnings.simplefilter("ignore")  # of torch's compiler about itself
    torch.compile = functools.partial(torch.compile, backend="aot_eager_decomp_partition")  # as above
    mesh, found = make_mesh(1, torch.device("cpu"), context_parallel_size=ranks), {}
    for kind in kinds:
        held = []
        for layers in (1, 3):
            torch._dynamo.reset()
            config = _compiled(kind, layers, ranks)
            decoder, tokens = build_network(config, mesh, config.train.recompute), torch.randint(96, (2, 256))
            decoder(tokens, tokens)[0].backward()
            held.append(min(kept_bytes(functools.partial(decoder, tokens, tokens), decoder) for _ in range(3)))
        found[kind] = held[1] - held[0]
    return found


def _compiled(kind: tuple[str, str, str, bool], layers: int, ranks: int) -> RunConfig:
    name, exchange, recompute, two_regions = kind
    sizes = {"vocab_size": 96, "hidden_size": 128, "intermediate_size": 176, "num_attention_heads": 8}
    latent = SHARED["mla"] | {"qk_rope_head_dim": 16, "v_head_dim": 16}
    return build_config({
        "model": sizes | {"num_hidden_layers": layers} | (latent if name == "mla" else SHARED[name]),
        "position": {"kind": "leaky-rerope", "window": 16, "leak": 8.0} if two_regions else {},
        "train": {"sequence_length": 256, "micro_batch_size": 2, "global_batch_size": 2, "compile": True}
        | {"recompute": recompute},
        "parallel": {"engine": "fold", "context_parallel_size": ranks, "context_exchange": exchange},
    })  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_blocks_of_context_ranks_keep_what_is_counted():
    kinds = [*itertools.product(("gqa", "mla"), ("gather", "heads"), ("none", "selective"), (False, True))]
    for kind, measured in _most(run_ranks(_held_compiled, 2, kinds, timeout_seconds=400)).items():
        _, exchange, recompute, two_regions = kind
        execution = Execution(
            2, recompute=recompute, device="cpu", compiled=True, regions=1 + two_regions, context_parallel_size=2,
            context_exchange=exchange,
        )  # fmt: skip
        held = [activations(_compiled(kind, layers, 2).model, 256, 256, execution).kept for layers in (1, 3)]
        assert held[1] - held[0] == pytest.approx(measured, rel=0.03), kind


def _most(by_rank: list[dict[Any, int]]) -> dict[Any, int]:
    return {key: max(found[key] for found in by_rank) for key in by_rank[0]}


def test_the_loss_of_llama_8b_on_a_gpu_by_hand():
    """8,192 tokens, compiled: one chunk in bf16 with its gradient; eager: two in float32, and a float32 sum for the head."""
    head, states = 128256 * 4096, 8192 * 4096
    held = [activations(LLAMA_8B, 8192, 8192, Execution(2, compiled=compiled)).loss for compiled in (True, False)]
    assert held == [8192 * 128256 * 4 + 2 * head + 2 * states, 4096 * 128256 * 6 + 6 * head + 2 * states]
