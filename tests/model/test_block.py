"""A block against its definition from its own parts."""

import torch

from model.block import TransformerBlock
from model.config import ModelConfig
from model.parallel.layers import serial_kit
from model.positions.batch import TokenLayout, make_positions
from model.positions.config import PositionConfig

CONFIG = ModelConfig(hidden_size=16, intermediate_size=24, num_attention_heads=4)
POSITIONS = make_positions(PositionConfig(), CONFIG, TokenLayout(2, 5), 16, "cpu", torch.float64)


def block() -> TransformerBlock:
    layer = TransformerBlock(CONFIG, 0, serial_kit(torch.float64))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def test_both_halves_norm_the_stream_and_add_to_it():
    layer, x_TD = block(), torch.randn(10, 16, dtype=torch.float64)

    def normed(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(1, keepdim=True) + CONFIG.rms_norm_eps).sqrt() * gain

    middle_TD = x_TD + layer.self_attn(normed(x_TD, layer.input_layernorm.weight), POSITIONS, None)
    want = middle_TD + layer.mlp(normed(middle_TD, layer.post_attention_layernorm.weight))
    torch.testing.assert_close(layer(x_TD, POSITIONS), want, rtol=1e-12, atol=1e-12)


def test_with_zero_output_projections_it_is_the_identity():
    layer, x_TD = block(), torch.randn(10, 16, dtype=torch.float64)
    torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    assert torch.equal(layer(x_TD, POSITIONS), x_TD)
