"""Grouped-query attention: groups, pattern, norms, and equality with plain formulas."""

import pytest
import torch

from model.attention import attention, local_groups, reading
from model.config import ModelConfig, PositionConfig
from model.parallel import serial


def _layer(layer=0, dtype=torch.float64, **config):
    torch.manual_seed(0)
    config = ModelConfig(hidden_size=32, num_attention_heads=8, head_dim=8, **config)
    module = attention(config, layer, serial(dtype))
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return config, module


def _read(config, position=None, batch=2, sequence=12, dtype=torch.float64, cu_seqlens=None):
    position = position or PositionConfig()
    return reading(position, config, batch, sequence, cu_seqlens, "cpu", dtype, trained_length=16)


@pytest.mark.parametrize("kv_heads", [8, 4, 1])
def test_causal_and_grouped(kv_heads):
    config, module = _layer(num_key_value_heads=kv_heads)
    h = torch.randn(24, 32, dtype=torch.float64)
    out = module(h, _read(config)).view(2, 12, 32)
    changed = h.clone().view(2, 12, 32)
    changed[:, 7:] += 1
    again = module(changed.view(24, 32), _read(config)).view(2, 12, 32)
    assert torch.allclose(out[:, :7], again[:, :7], atol=1e-12)
    assert (out[:, 7:] - again[:, 7:]).abs().max() > 1e-3


def test_groups_are_consecutive():
    assert local_groups(8, 2, 1, 0) == [0, 0, 0, 0, 1, 1, 1, 1]
    assert local_groups(8, 8, 1, 0) == list(range(8))
    assert local_groups(8, 1, 2, 1) == [0, 0, 0, 0]
    assert local_groups(6, 3, 2, 0) == [0, 0, 1]
