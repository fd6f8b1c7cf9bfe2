"""Every map with every kind of attention, against a rotation of each pair by itself in float64."""

from itertools import pairwise

import pytest
import torch

from model.attention import attention, local_groups
from model.config import ModelConfig, PositionConfig
from model.layers import serial
from model.positions import reading
from tests.model.oracle import MAPS, TRAINED, layer_oracle

MLA = {"attention": "mla", "kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
KINDS = {
    "mha": {},
    "gqa": {"num_key_value_heads": 2},
    "mqa": {"num_key_value_heads": 1},
    "mla": MLA,
    "mla-lora": MLA | {"q_lora_rank": 9},
    "rms": {"num_key_value_heads": 2, "qk_norm": "rms"},
    "key-l2": {"num_key_value_heads": 2, "qk_norm": "key-l2"},
}


def make(layer: int = 0, **config):
    """A configuration of 4 heads on width 16, and one layer of it in float64."""
    torch.manual_seed(0)
    settings = ModelConfig(**({"hidden_size": 16, "num_attention_heads": 4, "head_dim": 8} | config))
    module = attention(settings, layer, serial(torch.float64))
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return settings, module


def read(config, position=None, batch=2, sequence=20, cu_seqlens=None):
    return reading(position or PositionConfig(), config, batch, sequence, cu_seqlens, "cpu", torch.float64, TRAINED)


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("position", MAPS)
def test_against_a_rotation_of_each_pair(position, kind, packed):
    config, layer = make(**KINDS[kind])
    cu_seqlens = torch.tensor([0, 3, 20, 29, 40], dtype=torch.int32) if packed else None
    h = torch.randn(40, 16, dtype=torch.float64, requires_grad=True)
    out = layer(h, read(config, MAPS[position], cu_seqlens=cu_seqlens))
    want = layer_oracle(layer, config, MAPS[position], h, 2, 20, cu_seqlens)
    probe = torch.randn_like(out)
    inputs = [h, *layer.parameters()]
    torch.testing.assert_close(out, want, rtol=0, atol=1e-12)
    for got, wanted in zip(torch.autograd.grad(out, inputs, probe), torch.autograd.grad(want, inputs, probe), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12 * max(1.0, wanted.abs().max().item()))


@pytest.mark.parametrize("kind", ["gqa", "mla"])
@pytest.mark.parametrize("position", ["rope", "yarn", "rerope-logn", "leaky", "inverse"])
def test_packed_documents_equal_each_alone(position, kind):
    config, layer = make(**KINDS[kind])
    h = torch.randn(30, 16, dtype=torch.float64)
    bounds = [0, 4, 5, 22, 30]
    packed = layer(h, read(config, MAPS[position], 1, 30, torch.tensor(bounds, dtype=torch.int32)))
    alone = [layer(h[a:b], read(config, MAPS[position], 1, b - a)) for a, b in pairwise(bounds)]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["gqa", "mla"])
def test_a_window_as_long_as_the_sequence_is_rope_bit_for_bit(kind):
    config, layer = make(**KINDS[kind])
    h = torch.randn(40, 16, dtype=torch.float64)
    plain = layer(h, read(config))
    for wide in (PositionConfig(kind="rerope", window=20), PositionConfig(kind="leaky-rerope", window=20, leak=0.1)):
        assert torch.equal(layer(h, read(config, wide)), plain)


def test_groups_are_consecutive():
    assert local_groups(8, 2, 1, 0) == [0, 0, 0, 0, 1, 1, 1, 1]
    assert local_groups(8, 8, 1, 0) == list(range(8))
    assert local_groups(8, 1, 2, 1) == [0, 0, 0, 0]
    assert local_groups(6, 3, 2, 0) == [0, 0, 1]


def test_keynorm_ignores_the_length_of_keys_and_has_no_other_scale():
    config, layer = make(qk_norm="key-l2")
    _, k, _ = layer.project(torch.randn(40, 16, dtype=torch.float64), read(config))
    torch.testing.assert_close(k.norm(dim=-1), torch.ones(2, 20, 4, dtype=torch.float64))
    assert layer.scale == 1.0
    with torch.no_grad():
        layer.k_proj.weight *= 3.0
    h = torch.randn(40, 16, dtype=torch.float64)
    before = layer(h, read(config))
    with torch.no_grad():
        layer.k_proj.weight /= 7.0
    torch.testing.assert_close(layer(h, read(config)), before, rtol=1e-12, atol=1e-13)


def test_windowed_layers_see_exactly_their_window():
    """(w - 1) * layers + 1 tokens of receptive field (kexue 9603)."""
    config, _ = make(sliding_window=3, full_attention_layers=[-1], num_hidden_layers=5)
    layers = [make(layer, sliding_window=3, full_attention_layers=[-1], num_hidden_layers=5)[1] for layer in range(4)]
    h = torch.randn(20, 16, dtype=torch.float64, requires_grad=True)
    x = h
    for layer in layers:
        x = x + layer(x, read(config, batch=1))
    x[-1].sum().backward()
    assert (h.grad.abs().sum(-1) > 0).tolist() == [False] * 11 + [True] * 9


@pytest.mark.parametrize("pattern", ["same", "none"])
def test_full_layers_of_the_pattern(pattern):
    settings = {"sliding_window": 4, "full_attention_layers": [-1], "num_hidden_layers": 3, "full_attention_position": pattern}
    h = torch.randn(40, 16, dtype=torch.float64)
    switched = PositionConfig(kind="rerope", window=6, log_n="inference")
    for index in range(3):
        config, layer = make(index, **settings)
        bare, reference = make(index)
        got = layer(h, read(config, switched))
        if index < 2:  # windowed: plain rotation, no log n
            torch.testing.assert_close(got, layer(h, read(config)), rtol=0, atol=0)
        elif pattern == "same":
            torch.testing.assert_close(got, reference(h, read(bare, switched)), rtol=0, atol=1e-14)
        else:
            none = PositionConfig(kind="none", log_n="inference")
            torch.testing.assert_close(got, reference(h, read(bare, none)), rtol=0, atol=1e-14)


def test_heads_that_do_not_divide_over_ranks_are_refused():
    kit = serial()
    kit.size = 3
    with pytest.raises(ValueError, match="num_attention_heads = 4 cannot be split over tensor_parallel_size = 3"):
        attention(ModelConfig(), 0, kit)


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"attention": "mla"}, "attention = 'mla' needs kv_lora_rank"),
        ({"head_dim": 7}, "head_dim = 7 must be even"),
        (MLA | {"qk_norm": "key-l2"}, "cannot be used with attention = 'mla'"),
        (MLA | {"qk_rope_head_dim": 3}, "qk_rope_head_dim = 3 must be even"),
    ],
)
def test_bad_models_are_refused_in_one_sentence(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        ModelConfig(**settings)
