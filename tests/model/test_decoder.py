"""The decoder against Hugging Face's Llama, and its loss against its logits."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from model.config import ModelConfig
from model.decoder import Decoder
from model.initialization import initialise
from model.parallel.layers import serial_kit
from model.positions.config import PositionConfig

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
}


def decoder(dtype: torch.dtype = torch.float32, seed: int = 0, **values) -> Decoder:
    model = Decoder(ModelConfig(**{**SIZES, **values}), PositionConfig(), 32, serial_kit(dtype))
    initialise(model, seed)
    return model


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_hugging_face_llama(kv_heads: int, tied: bool):
    ours = decoder(num_key_value_heads=kv_heads, tie_word_embeddings=tied, tied_head="plain")
    config = LlamaConfig(
        **SIZES, num_key_value_heads=kv_heads, tie_word_embeddings=tied, rms_norm_eps=ours.config.rms_norm_eps,
        max_position_embeddings=64, rope_theta=10000.0, attn_implementation="eager",
    )  # fmt: skip
    theirs = LlamaForCausalLM(config)
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not unexpected and set(missing) <= ({"lm_head.weight"} if tied else set())
    theirs.tie_weights()
    tokens_BS = torch.randint(0, 97, (3, 29), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens_BS), theirs(tokens_BS).logits, rtol=1e-5, atol=1e-5)


def test_loss_is_the_cross_entropy_of_the_logits_and_skips_what_is_not_scored():
    model = decoder(torch.float64)
    tokens_BS = torch.randint(0, 97, (2, 20), generator=torch.Generator().manual_seed(1))
    targets_BS = tokens_BS.roll(-1, 1).clone()
    targets_BS[:, -3:] = -100
    loss_sum, count = model(tokens_BS, targets_BS)
    want = torch.nn.functional.cross_entropy(model(tokens_BS).flatten(0, 1), targets_BS.flatten(), reduction="sum")
    assert int(count) == 34
    torch.testing.assert_close(loss_sum, want, rtol=1e-12, atol=0)
    got = torch.autograd.grad(loss_sum, list(model.parameters()))
    for ours, theirs in zip(got, torch.autograd.grad(want, list(model.parameters())), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_losses_by_row_sum_to_the_loss():
    model = decoder(torch.float64)
    tokens_BS = torch.randint(0, 97, (3, 20), generator=torch.Generator().manual_seed(1))
    targets_BS = tokens_BS.roll(-1, 1).clone()
    targets_BS[1, :7] = -100
    loss, count = model(tokens_BS, targets_BS)
    losses_B, counts_B = model(tokens_BS, targets_BS, by_row=True)
    assert counts_B.tolist() == [20, 13, 20] and int(count) == 53
    torch.testing.assert_close(losses_B.sum(), loss, rtol=1e-12, atol=0)
    alone, _ = model(tokens_BS[1:2], targets_BS[1:2])
    torch.testing.assert_close(losses_B[1], alone, rtol=1e-12, atol=0)
