"""A block against its definition from its own parts."""

from typing import Any

import pytest
import torch

from model.block import TransformerBlock
from model.config import ModelConfig
from model.parallel.layers import serial_kit
from model.positions.batch import TokenLayout, make_positions
from model.positions.config import PositionConfig

CONFIG = ModelConfig(hidden_size=16, intermediate_size=24, num_attention_heads=4)
POSITIONS = make_positions(PositionConfig(), CONFIG, TokenLayout(2, 5), 16, "cpu", torch.float64)


def block(config: ModelConfig = CONFIG) -> TransformerBlock:
    layer = TransformerBlock(config, 0, serial_kit(torch.float64))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def normed(x: torch.Tensor, norm: Any) -> torch.Tensor:
    gain = 1 + norm.weight if norm.zero_centered else norm.weight
    return x / (x.square().mean(1, keepdim=True) + CONFIG.rms_norm_eps).sqrt() * gain


def test_both_halves_norm_the_stream_and_add_to_it():
    layer, x_TD = block(), torch.randn(10, 16, dtype=torch.float64)
    middle_TD = x_TD + layer.self_attn(normed(x_TD, layer.input_layernorm), POSITIONS, None)
    want = middle_TD + layer.mlp(normed(middle_TD, layer.post_attention_layernorm), 1)
    torch.testing.assert_close(layer(x_TD, POSITIONS), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("placement", ["post", "sandwich"])
def test_norms_of_outputs_come_before_the_sum(placement: str, zero_centered: bool):
    layer = block(CONFIG.model_copy(update={"norm_placement": placement, "zero_centered_gains": zero_centered}))
    x_TD, both = torch.randn(10, 16, dtype=torch.float64), placement == "sandwich"
    h_TD = normed(x_TD, layer.input_layernorm) if both else x_TD
    middle_TD = x_TD + normed(layer.self_attn(h_TD, POSITIONS, None), layer.post_attention_layernorm)
    h_TD = normed(middle_TD, layer.pre_feedforward_layernorm) if both else middle_TD
    want = middle_TD + normed(layer.mlp(h_TD, 1), layer.post_feedforward_layernorm)
    torch.testing.assert_close(layer(x_TD, POSITIONS), want, rtol=1e-12, atol=1e-12)
    norms = [name for name, _ in layer.named_children() if name.endswith("layernorm")]
    assert len(norms) == layer.norms == (4 if both else 2)


def test_with_zero_output_projections_it_is_the_identity():
    layer, x_TD = block(), torch.randn(10, 16, dtype=torch.float64)
    torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    assert torch.equal(layer(x_TD, POSITIONS), x_TD)
