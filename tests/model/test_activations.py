"""Bytes kept for the backward against what autograd saves and hand counts."""

import functools
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch

from launch.config import build_config
from launch.network import build_network
from model.activations import activations
from model.decoder import Decoder
from model.parallel.layers import serial_kit
from model.parallel.mesh import Mesh
from model.positions.config import PositionConfig
from model.sublayer import Execution
from tests.model.networks import LLAMA_8B, NETWORKS


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


def test_the_loss_of_llama_8b_on_a_gpu_by_hand():
    """8,192 tokens, compiled: one chunk in bf16 with its gradient; eager: two in float32, and a float32 sum for the head."""
    head, states = 128256 * 4096, 8192 * 4096
    held = [activations(LLAMA_8B, 8192, 8192, Execution(2, compiled=compiled)).loss for compiled in (True, False)]
    assert held == [8192 * 128256 * 4 + 2 * head + 2 * states, 4096 * 128256 * 6 + 6 * head + 2 * states]
