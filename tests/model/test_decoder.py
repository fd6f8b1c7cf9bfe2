import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from model.config import ModelConfig, PositionConfig
from model.decoder import Decoder, initialise, rms_floors
from model.layers import serial

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
}


def decoder(dtype: torch.dtype = torch.float32, seed: int = 0, **values) -> Decoder:
    model = Decoder(ModelConfig(**{**SIZES, **values}), PositionConfig(), 32, serial(dtype))
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


def test_weights_depend_on_the_seed_and_nothing_else():
    torch.manual_seed(1)
    first = decoder(seed=3)
    torch.manual_seed(2)
    again, other = decoder(seed=3), decoder(seed=4)
    for name, weight in first.named_parameters():
        assert torch.equal(weight, dict(again.named_parameters())[name])
    assert not torch.equal(first.model.embed_tokens.weight, other.model.embed_tokens.weight)


def test_deep_output_projections_start_smaller():
    model = decoder(hidden_size=256, intermediate_size=512)
    block = model.model.layers[0]
    assert block.mlp.up_proj.weight.std().item() == pytest.approx(0.2, rel=0.03)
    assert block.mlp.down_proj.weight.std().item() == pytest.approx(0.2 / math.sqrt(6), rel=0.03)
    zero = decoder(residual_init="zero")
    assert not zero.model.layers[1].self_attn.o_proj.weight.any()


@pytest.mark.parametrize("residual_init", ["scaled", "plain", "zero"])
@pytest.mark.parametrize("tied_head", ["small-init", "projection"])
def test_tigers_floor_is_a_tenth_of_what_each_matrix_was_drawn_with(residual_init: str, tied_head: str):
    """Measured on the drawn tensors; one of zeros counts as the scaled one."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "tied_head": tied_head}
    model = decoder(residual_init=residual_init, **sizes)
    drawn = decoder(residual_init="scaled" if residual_init == "zero" else residual_init, **sizes)
    floors = rms_floors(model)
    assert list(floors) == [name for name, _ in model.named_parameters()]
    for name, weight in drawn.named_parameters():
        if weight.ndim == 2:
            assert floors[name] == pytest.approx(0.1 * weight.square().mean().sqrt().item(), rel=0.03), name
    assert set(rms_floors(model, 0.5).values()) == {0.5}


def test_every_parameter_says_what_it_is():
    model = decoder(tie_word_embeddings=False)
    kinds = {name: parameter.logical.kind for name, parameter in model.named_parameters()}
    assert kinds["model.embed_tokens.weight"] == "embedding"
    assert kinds["lm_head.weight"] == "matrix"
    assert all((kind == "gain") == ("norm" in name) for name, kind in kinds.items())
    assert all(parameter.logical.shape == tuple(parameter.shape) for parameter in model.parameters())
