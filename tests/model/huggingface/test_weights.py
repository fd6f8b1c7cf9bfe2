"""Exported tensors give a stock architecture the logits of the network."""

import pytest
import torch

from model.config import ModelConfig
from model.decoder import Decoder
from model.huggingface.families import FAMILIES
from model.huggingface.weights import exported_tensors, has_stacks, stored_rows, stored_shapes, swap_halves
from model.initialization import initialise
from model.parallel.layers import serial_kit
from model.positions.config import PositionConfig
from model.sizes import full_shapes

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}

LLAMA, PHI = FAMILIES["llama"], FAMILIES["phi3"]


def decoder(**head) -> Decoder:
    model = Decoder(ModelConfig(**SIZES, **head, initializer_range=0.3), PositionConfig(), 16, serial_kit())
    initialise(model, 0)
    return model


@pytest.mark.parametrize("head", ["plain", "half-swap", "projection", "small-init"])
def test_a_tied_head_is_exported_with_the_same_logits(head: str):
    ours = decoder(tied_head=head)
    untied = head in ("half-swap", "projection")
    stock = decoder(tied_head="plain", tie_word_embeddings=not untied)
    own = dict(ours.named_parameters())
    exported = {
        tensor.name: tensor.make(*(own[part] for part in tensor.parts)) for tensor in exported_tensors(ours.config, LLAMA)
    }
    assert {tensor.name: tensor.shape for tensor in exported_tensors(ours.config, LLAMA)} == full_shapes(stock.config)
    stock.load_state_dict(exported, strict=untied)
    tokens_BS = torch.randint(0, 40, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(stock(tokens_BS), ours(tokens_BS), rtol=1e-5, atol=1e-5)


def test_experts_lie_in_stacks_or_one_by_one():
    config = ModelConfig(**SIZES, feed_forward="moe", moe_intermediate_size=6, n_routed_experts=3, first_k_dense_replace=1)
    shapes, stacks = full_shapes(config), stored_shapes(stored_rows(config, LLAMA, stacked=True))
    assert stacks["model.layers.1.mlp.experts.gate_up_proj"] == (3, 12, 16)
    assert stacks["model.layers.1.mlp.experts.down_proj"] == (3, 16, 6)
    assert {name: shape for name, shape in shapes.items() if ".experts." not in name}.items() <= stacks.items()
    up = stored_rows(config, LLAMA, stacked=True)["model.layers.1.mlp.experts.2.up_proj.weight"]
    assert (up.start, up.shape, up.expert) == (6, (6, 16), 2)
    assert stored_shapes(stored_rows(config, LLAMA)) == shapes
    assert has_stacks(stacks) and not has_stacks(shapes)
    renamed = {tensor.parts[0]: tensor.name for tensor in exported_tensors(config, FAMILIES["mixtral"])}
    assert renamed["model.layers.1.mlp.experts.2.up_proj.weight"] == "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    precise = {tensor.name for tensor in exported_tensors(config, LLAMA) if tensor.precise}
    assert precise == {"model.layers.1.mlp.gate.e_score_correction_bias"}


def test_an_untied_head_is_exported_as_it_is():
    exported = exported_tensors(ModelConfig(**SIZES, tie_word_embeddings=False), LLAMA)
    assert all(tensor.parts == (tensor.name,) for tensor in exported) and "lm_head.weight" in {t.name for t in exported}


def test_swapping_twice_changes_nothing():
    weight_VD = torch.randn(3, 8)
    assert torch.equal(swap_halves(swap_halves(weight_VD)), weight_VD) and swap_halves(weight_VD)[0, 0] == weight_VD[0, 4]


def test_fused_tensors_come_apart_and_together_again():
    ours = decoder(tied_head="plain", num_key_value_heads=2)
    own = dict(ours.named_parameters())
    exported = {
        tensor.name: tensor.make(*(own[part] for part in tensor.parts)) for tensor in exported_tensors(ours.config, PHI)
    }
    assert exported["model.layers.1.self_attn.qkv_proj.weight"].shape == (16 + 8 + 8, 16)
    assert not any("q_proj" in name or "gate_proj" in name for name in exported)
    places = stored_rows(ours.config, PHI)
    assert stored_shapes(places) == {name: tuple(tensor.shape) for name, tensor in exported.items()}
    for name, parameter in own.items():
        place = places[name]
        assert torch.equal(exported[place.name][place.start : place.start + place.shape[0]], parameter), name
