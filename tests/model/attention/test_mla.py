"""Latent attention against Hugging Face's DeepSeek-V3, and its two forms against each other."""

import pytest
import torch

from model.attention.kv_cache import KVCache
from model.config import ModelConfig
from model.decoder import Decoder
from model.initialization import initialise
from model.parallel.layers import serial_kit
from model.positions.batch import TokenLayout
from model.positions.config import PositionConfig

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
}  # fmt: skip
RANKS = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}


def make(q_lora_rank=12, dtype=torch.float64, **position):
    config = ModelConfig(**SIZES, **RANKS, attention="mla", q_lora_rank=q_lora_rank, initializer_range=0.2)
    decoder = Decoder(config, PositionConfig(**position), 24, serial_kit(dtype))
    initialise(decoder, 3)
    generator = torch.Generator().manual_seed(0)
    for name, weight in decoder.named_parameters():
        if "norm" in name:
            weight.data.uniform_(0.5, 1.5, generator=generator)
    return decoder


@pytest.mark.parametrize("q_lora_rank", [12, None])
def test_logits_equal_deepseek_v3(q_lora_rank):
    """Dense layers, the same weights under the same names."""
    transformers = pytest.importorskip("transformers")
    decoder = make(q_lora_rank)
    config = transformers.DeepseekV3Config(
        **SIZES, **RANKS, q_lora_rank=q_lora_rank, num_key_value_heads=4, first_k_dense_replace=2, n_routed_experts=2,
        num_experts_per_tok=1, n_group=1, topk_group=1, max_position_embeddings=64, attn_implementation="eager",
    )  # fmt: skip
    theirs = transformers.DeepseekV3ForCausalLM(config).double().eval()
    missing, unexpected = theirs.load_state_dict(decoder.state_dict(), strict=False)
    assert not unexpected and all("rotary" in name for name in missing), (missing, unexpected)
    tokens = torch.randint(0, 64, (2, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(decoder(tokens), theirs(tokens).logits, rtol=0, atol=1e-5)  # theirs rotates in float32


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-4)])
@pytest.mark.parametrize("position", [{}, {"kind": "rerope", "window": 7, "log_n": "inference"}])
def test_absorbed_equals_unabsorbed(position, dtype, tolerance):
    """With the scale of the un-absorbed widths in both forms."""
    decoder = make(dtype=dtype, **position)
    tokens = torch.randint(0, 64, (2, 30), generator=torch.Generator().manual_seed(1))
    cache = KVCache(decoder.config, decoder.position, 24, 2, 30)
    with torch.no_grad():
        decoder(tokens[:, :11], cache=cache)
        absorbed = decoder(tokens[:, 11:], cache=cache)
        torch.testing.assert_close(absorbed, decoder(tokens)[:, 11:], rtol=0, atol=tolerance)


def test_the_rotated_key_comes_from_the_stream_not_the_latent():
    decoder = make()
    layer = decoder.model.layers[0].self_attn
    weight = layer.kv_a_proj_with_mqa.weight.data
    direction = torch.zeros(32, dtype=torch.float64)
    direction[5] = 1.0
    weight[:16, 5] = 0.0  # the latent does not see this channel
    h = torch.randn(10, 32, dtype=torch.float64)
    positions = decoder.positions_for(TokenLayout(1, 10))
    _, latent, shared = layer.project(h, positions)
    _, latent_again, shared_again = layer.project(h + direction, positions)
    torch.testing.assert_close(latent, latent_again, rtol=0, atol=1e-14)
    assert (shared - shared_again).abs().max() > 1e-2
