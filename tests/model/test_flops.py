"""Parameters and operations against hand counts, published sizes and torch's own counter."""

import functools
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from launch.config import build
from launch.network import network
from model.config import ModelConfig, PositionConfig
from model.decoder import Decoder
from model.flops import activations, attention_flops_per_token, flops_per_token, matrix_flops_per_token, parameters, tensors
from model.layers import serial
from model.parallel import Topology

LLAMA_8B = ModelConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, tie_word_embeddings=False,
)  # fmt: skip
DEEPSEEK_V2 = ModelConfig(
    vocab_size=102400, hidden_size=5120, intermediate_size=12288, num_hidden_layers=60, num_attention_heads=128,
    attention="mla", q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
)  # fmt: skip


def test_llama_8b_by_hand():
    assert parameters(LLAMA_8B) == {
        "embedding": 525_336_576,
        "attention": 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024),
        "mlp": 32 * 3 * 4096 * 14336,
        "norms": 65 * 4096,
        "head": 525_336_576,
        "total": 8_030_261_248,  # as published
    }


def test_flops_of_llama_8b_by_hand():
    multiplied = 8_030_261_248 - 525_336_576 - 65 * 4096
    assert flops_per_token(LLAMA_8B, 4096, causal=False) == 6 * multiplied + 12 * 32 * 4096 * 4096
    assert flops_per_token(LLAMA_8B, 4096, causal=True) == 6 * multiplied + 6 * 32 * 4096 * 4097


def test_published_mfu_of_an_8b_model():
    """10,471 tokens a second on a peak of 989 TFLOP/s, without the input embedding: 54.5 % full, 51.1 % causal."""
    full, causal = (10_471 * flops_per_token(LLAMA_8B, 4096, causal=how) / 989e12 for how in (False, True))
    assert full == pytest.approx(0.545, abs=5e-4)
    assert causal == pytest.approx(0.511, abs=5e-4)


@pytest.mark.parametrize(
    ("width", "heads", "q_lora_rank", "millions"), [(5120, 128, 1536, 149.2), (7168, 128, 1536, 187.1), (2048, 16, None, 13.8)]
)
def test_attention_parameters_of_deepseek(width, heads, q_lora_rank, millions):
    """V2, V3 and V2-Lite: parameters of one MLA layer as published."""
    config = DEEPSEEK_V2.model_copy(
        update={"hidden_size": width, "num_attention_heads": heads, "q_lora_rank": q_lora_rank, "num_hidden_layers": 1}
    )
    assert parameters(config)["attention"] / 1e6 == pytest.approx(millions, abs=0.05)


def test_tied_head_multiplies_but_has_no_parameters():
    tied = ModelConfig(tie_word_embeddings=True, tied_head="half-swap")
    untied = ModelConfig(tie_word_embeddings=False)
    assert parameters(tied)["head"] == 0
    assert flops_per_token(tied, 64, causal=True) == flops_per_token(untied, 64, causal=True)


def test_windowed_scores_are_counted_one_by_one():
    config = ModelConfig(num_hidden_layers=3, sliding_window=5, full_attention_layers=[-1])
    length = 16
    windowed = sum(1 for i in range(length) for j in range(i + 1) if i - j < 5)
    full = length * (length + 1) / 2
    per_score = 2 * config.num_attention_heads * 2 * config.head_size
    assert attention_flops_per_token(config, length, causal=True) == pytest.approx(per_score * (2 * windowed + full) / length)


def test_every_rank_holds_its_share():
    split = [tensor for tensor in tensors(DEEPSEEK_V2) if tensor.split is not None]
    whole = [tensor for tensor in tensors(DEEPSEEK_V2) if tensor.split is None]
    assert {tensor.name.split(".")[-2] for tensor in whole} == {
        "q_a_proj", "q_a_layernorm", "kv_a_proj_with_mqa", "kv_a_layernorm",
        "input_layernorm", "post_attention_layernorm", "norm",
    }  # fmt: skip
    assert all(tensor.numbers_per_rank(8) * 8 == tensor.numbers for tensor in split)
    assert all(tensor.numbers_per_rank(8) == tensor.numbers for tensor in whole)


SMALL = dict(vocab_size=96, hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4)
MLA = dict(attention="mla", kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6)
NETWORKS = {
    "gqa": ModelConfig(**SMALL, num_key_value_heads=2),
    "mha, untied, qk norm": ModelConfig(**SMALL, tie_word_embeddings=False, qk_norm="rms"),
    "projected head": ModelConfig(**SMALL, tied_head="projection"),
    "mla": ModelConfig(**SMALL, **MLA, q_lora_rank=12),
    "mla, full-rank queries": ModelConfig(**SMALL, **MLA),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_of_the_decoder_is_foreseen(name):
    config = NETWORKS[name]
    decoder = Decoder(config, PositionConfig(), 16, serial())
    made = {name: (tuple(value.shape), value.dim() == 2) for name, value in decoder.named_parameters()}
    assert made == {tensor.name: (tensor.shape, len(tensor.shape) == 2) for tensor in tensors(config)}
    assert parameters(config)["total"] == sum(value.numel() for value in decoder.parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_matrix_products_as_torch_counts_them(name):
    """Forward and backward; torch's counter does not see inside our attention, so the two are held apart."""
    config = NETWORKS[name]
    decoder = Decoder(config, PositionConfig(), 16, serial())
    tokens = torch.randint(96, (2, 16))
    with FlopCounterMode(display=False) as counter:
        loss, _ = decoder(tokens, tokens)
        loss.backward()
    counted = sum(
        count for place, ops in counter.get_flop_counts().items() if place == "Global"
        for op, count in ops.items() if str(op) in ("aten.mm", "aten.addmm")
    )  # fmt: skip
    assert counted == 3 * matrix_flops_per_token(config) * 32


@pytest.mark.parametrize("name", ["gqa", "mla"])
def test_attention_products_as_torch_counts_them(name):
    """The products of every score, as a kernel without a mask forms them: torch's count for dense attention."""
    config = NETWORKS[name]
    heads, length = config.num_attention_heads, 16
    q, k = (torch.randn(heads, length, config.head_size, requires_grad=True) for _ in range(2))
    v = torch.randn(heads, length, config.value_size, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        torch.bmm(torch.softmax(torch.bmm(q, k.mT), -1), v).sum().backward()
    counted = counter.get_total_flops() * config.num_hidden_layers / length
    assert counted == 3 * attention_flops_per_token(config, length, causal=False)


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


@pytest.mark.parametrize(("name", "slack"), [("gqa", 0.02), ("mha, untied, qk norm", 0.15), ("mla", 0.15)])
def test_activations_are_what_autograd_saves(name, slack):
    config = NETWORKS[name].model_copy(update={"num_hidden_layers": 6})
    decoder = Decoder(config, PositionConfig(), 64, serial())
    tokens = torch.randint(96, (4, 64))
    measured = kept_bytes(lambda: decoder(tokens, tokens), decoder)
    head = 4 * (96 * 32 + 4 * 64 * 32)  # gradients of the head and the hidden states, formed in the forward
    assert activations(config, 4 * 64, 64, 4, device="cpu").kept == pytest.approx(measured - head, rel=slack)


COMPILED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gqa, two regions": ({"num_key_value_heads": 2}, {"kind": "leaky-rerope", "window": 16, "leak": 16.0}),
    "qk norm": ({"qk_norm": "rms"}, {}),
    "mla": (
        {"attention": "mla", "q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
         "v_head_dim": 16}, {},
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # of torch's compiler about itself
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_blocks_keep_what_is_planned(name, recompute, monkeypatch):
    # cuts forward from backward as Inductor does, in a tenth of the time
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager_decomp_partition"))
    sizes, position = COMPILED[name]
    layer = []
    for layers in (1, 3):
        base = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4}
        train = {"sequence_length": 64, "micro_batch_size": 4, "compile": True}
        config = build({"model": base | sizes | {"num_hidden_layers": layers}, "position": position, "train": train})
        decoder, tokens = network(config, Topology(), recompute), torch.randint(96, (4, 64))
        decoder(tokens, tokens)[0].backward()
        measured = kept_bytes(functools.partial(decoder, tokens, tokens), decoder)
        planned = activations(
            config.model, 4 * 64, 64, 2, recompute=recompute, device="cpu", compiled=True, regions=2 if position else 1
        )
        layer.append((measured, planned.kept))
    measured, planned = (layer[1][i] - layer[0][i] for i in (0, 1))
    assert planned == pytest.approx(measured, rel=0.02)


def test_the_loss_of_llama_8b_on_a_gpu_by_hand():
    """8,192 tokens, compiled: one chunk in bf16 with its gradient; eager: two in float32, and a float32 sum for the head."""
    head, states = 128256 * 4096, 8192 * 4096
    held = [activations(LLAMA_8B, 8192, 8192, 2, compiled=compiled).loss for compiled in (True, False)]
    assert held == [8192 * 128256 * 4 + 2 * head + 2 * states, 4096 * 128256 * 6 + 6 * head + 2 * states]
