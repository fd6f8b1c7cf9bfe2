"""Compiled and recomputed blocks give what plain ones give, without compiling again from step to step."""

from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from model.config import ModelConfig
from model.decoder import Decoder
from model.initialization import initialise
from model.parallel.layers import serial_kit
from model.positions.config import PositionConfig

MLA = {"attention": "mla", "kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
KINDS = {"gqa": {"num_key_value_heads": 2}, "mla": MLA}
SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}


def make(kind: str, layers: int = 1) -> Decoder:
    decoder = Decoder(
        ModelConfig(**{**SIZES, "num_hidden_layers": layers}, **KINDS[kind], initializer_range=0.3),
        PositionConfig(kind="leaky-rerope", window=5, leak=0.1, log_n="trained"), 20, serial_kit(torch.float64),
    )  # fmt: skip
    initialise(decoder, 0)
    return decoder


def gradients(decoder: Decoder, seed: int) -> list[torch.Tensor]:
    tokens = torch.randint(0, 40, (2, 21), generator=torch.Generator().manual_seed(seed))
    decoder.zero_grad()
    loss, _ = decoder(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in decoder.parameters())]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch reads it itself
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_blocks(kind: str):
    torch._dynamo.reset()
    plain, compiled = make(kind), make(kind)
    counter = CompileCounterWithBackend("aot_eager")
    for block in compiled.model.layers:
        block.compile(backend=counter, fullgraph=True)
    for seed in range(3):
        for got, want in zip(gradients(compiled, seed), gradients(plain, seed), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_blocks(kind: str):
    plain, again = make(kind), make(kind)
    again.run_block = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    for got, want in zip(gradients(again, 0), gradients(plain, 0), strict=True):
        assert torch.equal(got, want)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_record_their_largest_logits_share_one_compiled_block(kind: str):
    torch._dynamo.reset()
    plain, compiled = make(kind, layers=3), make(kind, layers=3)
    counter = CompileCounterWithBackend("aot_eager")
    compiled.run_block = torch.compile(compiled.run_block, backend=counter, fullgraph=True)
    for decoder in (plain, compiled):
        for block in decoder.blocks:
            block.self_attn.record_logits(torch.device("cpu"))
    for seed in range(3):
        gradients(compiled, seed)
        gradients(plain, seed)
    for one, other in zip(compiled.blocks, plain.blocks, strict=True):
        torch.testing.assert_close(one.self_attn.largest_logit_n, other.self_attn.largest_logit_n, rtol=1e-11, atol=0)
    assert counter.frame_count == 1
