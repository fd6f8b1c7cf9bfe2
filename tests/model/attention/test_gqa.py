"""Every map with every kind of attention, against a rotation of each pair by itself in float64."""

from itertools import pairwise

import pytest
import torch

from model.attention.gqa import GroupedQueryAttention
from model.config import ModelConfig
from model.parallel.layers import Kit
from model.positions.config import PositionConfig
from tests.model.oracle import MAPS, layer_oracle, make_layer, positions_of

MLA = {"attention": "mla", "kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
KINDS = {
    "mha": {},
    "gqa": {"num_key_value_heads": 2},
    "mqa": {"num_key_value_heads": 1},
    "mla": MLA,
    "mla-lora": MLA | {"q_lora_rank": 9},
    "rms": {"num_key_value_heads": 2, "qk_norm": "rms"},
    "key-l2": {"num_key_value_heads": 2, "qk_norm": "key-l2"},
    "rms-all-heads": {"num_key_value_heads": 2, "qk_norm": "rms-all-heads", "query_pre_attn_scalar": 3.0},
    "biases": {"num_key_value_heads": 2, "attention_bias": "all"},
}


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("position", MAPS)
def test_against_a_rotation_of_each_pair(position, kind, packed):
    config, layer = make_layer(**KINDS[kind])
    cu_seqlens = torch.tensor([0, 3, 20, 29, 40], dtype=torch.int32) if packed else None
    h = torch.randn(40, 16, dtype=torch.float64, requires_grad=True)
    out = layer(h, positions_of(config, MAPS[position], cu_seqlens=cu_seqlens))
    want = layer_oracle(layer, config, MAPS[position], h, 2, 20, cu_seqlens)
    probe = torch.randn_like(out)
    inputs = [h, *layer.parameters()]
    torch.testing.assert_close(out, want, rtol=0, atol=1e-12)
    for got, wanted in zip(torch.autograd.grad(out, inputs, probe), torch.autograd.grad(want, inputs, probe), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12 * max(1.0, wanted.abs().max().item()))


@pytest.mark.parametrize("kind", ["gqa", "mla"])
@pytest.mark.parametrize("position", ["rope", "yarn", "rerope-logn", "leaky", "inverse"])
def test_packed_documents_equal_each_alone(position, kind):
    config, layer = make_layer(**KINDS[kind])
    h = torch.randn(30, 16, dtype=torch.float64)
    bounds = [0, 4, 5, 22, 30]
    packed = layer(h, positions_of(config, MAPS[position], 1, 30, torch.tensor(bounds, dtype=torch.int32)))
    alone = [layer(h[a:b], positions_of(config, MAPS[position], 1, b - a)) for a, b in pairwise(bounds)]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["gqa", "mla"])
def test_a_window_as_long_as_the_sequence_is_rope_bit_for_bit(kind):
    config, layer = make_layer(**KINDS[kind])
    h = torch.randn(40, 16, dtype=torch.float64)
    plain = layer(h, positions_of(config))
    for wide in (PositionConfig(kind="rerope", window=20), PositionConfig(kind="leaky-rerope", window=20, leak=0.1)):
        assert torch.equal(layer(h, positions_of(config, wide)), plain)


def test_ranks_that_share_a_kv_head_take_that_of_their_query_heads():
    config, heads = ModelConfig(num_attention_heads=8, num_key_value_heads=2), torch.arange(2).view(1, 1, 2, 1)
    for rank in range(4):
        kit = Kit(size=4)
        kit.rank = rank
        assert GroupedQueryAttention(config, 0, kit)._select_kv(heads).item() == rank // 2


def test_keynorm_ignores_the_length_of_keys_and_has_no_other_scale():
    config, layer = make_layer(qk_norm="key-l2")
    _, k, _ = layer.project(torch.randn(40, 16, dtype=torch.float64), positions_of(config))
    torch.testing.assert_close(k.norm(dim=-1), torch.ones(2, 20, 4, dtype=torch.float64))
    assert layer.scale == 1.0
    with torch.no_grad():
        layer.k_proj.weight *= 3.0
    h = torch.randn(40, 16, dtype=torch.float64)
    before = layer(h, positions_of(config))
    with torch.no_grad():
        layer.k_proj.weight /= 7.0
    torch.testing.assert_close(layer(h, positions_of(config)), before, rtol=1e-12, atol=1e-13)


def test_all_heads_are_normed_together():
    config, layer = make_layer(num_key_value_heads=2, qk_norm="rms-all-heads")
    h_TD = torch.randn(40, 16, dtype=torch.float64)
    q, k, _ = layer.project(h_TD, positions_of(config))
    for got, projection, norm in ((q, layer.q_proj, layer.q_norm), (k, layer.k_proj, layer.k_norm)):
        want = torch.nn.functional.rms_norm(projection(h_TD), norm.weight.shape, norm.weight, config.rms_norm_eps)
        torch.testing.assert_close(got.flatten(2).flatten(0, 1), want, rtol=1e-12, atol=1e-12)


def test_scores_are_divided_by_the_root_of_what_is_asked_for():
    assert make_layer(query_pre_attn_scalar=5.0)[1].scale == 5.0**-0.5 != make_layer()[1].scale == 8**-0.5
