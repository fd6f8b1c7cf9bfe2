"""Initial weights: what they depend on, their deviations, and Tiger's floors."""

import math
import zlib

import pytest
import torch

from model.config import ModelConfig
from model.decoder import Decoder
from model.initialization import initialise, rms_floors
from model.parallel.layers import serial_kit
from model.positions.config import PositionConfig


def decoder(seed: int = 0, **values) -> Decoder:
    sizes = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = Decoder(ModelConfig(**(sizes | {"initializer_range": 0.2} | values)), PositionConfig(), 32, serial_kit())
    initialise(model, seed)
    return model


def test_weights_depend_on_the_seed_and_nothing_else():
    torch.manual_seed(1)
    first = decoder(seed=3)
    torch.manual_seed(2)
    again, other = decoder(seed=3), decoder(seed=4)
    for name, weight in first.named_parameters():
        assert torch.equal(weight, dict(again.named_parameters())[name])
    assert not torch.equal(first.model.embed_tokens.weight, other.model.embed_tokens.weight)


@pytest.mark.parametrize("tied", [True, False])
def test_padding_is_zeros_behind_the_weights_without_it(tied: bool):
    plain, padded = decoder(tie_word_embeddings=tied), decoder(tie_word_embeddings=tied, pad_vocab_to_multiple=40)
    for name, weight in plain.named_parameters():
        found = dict(padded.named_parameters())[name]
        assert torch.equal(found[: len(weight)], weight) and not found[len(weight) :].any()
    assert len(padded.lm_head.weight) == len(padded.model.embed_tokens.weight) == 120


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


def test_a_projection_starts_orthogonal():
    full = decoder(tied_head="projection").lm_head.projection.weight
    torch.testing.assert_close(full @ full.T, torch.eye(48), rtol=0, atol=1e-5)


def test_weights_are_those_of_the_first_version():
    """Of seed 3, on a CPU: drawn by torch's generator seeded with crc32("3/NAME"), times the deviation."""
    model = decoder(seed=3, tied_head="projection")
    generator = torch.Generator().manual_seed(zlib.crc32(b"3/model.layers.2.mlp.down_proj.weight"))
    want = torch.randn((48, 80), generator=generator).mul_(0.2 / math.sqrt(6))
    assert torch.equal(model.model.layers[2].mlp.down_proj.weight, want)
    generator = torch.Generator().manual_seed(zlib.crc32(b"3/lm_head.projection.weight"))
    assert torch.equal(model.lm_head.projection.weight, torch.linalg.qr(torch.randn((48, 48), generator=generator))[0])
    assert torch.equal(model.model.norm.weight, torch.ones(48))
