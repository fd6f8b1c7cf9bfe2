"""Sizes of networks that do not exist against hand counts, published numbers and networks that do."""

import math
import time

import pytest

from model.config import ModelConfig
from model.decoder import Decoder
from model.parallel.layers import serial_kit
from model.positions.config import PositionConfig
from model.sizes import (
    check_held,
    check_split,
    elements_per_rank,
    full_shapes,
    parameter_counts,
    parameter_specs,
    planned_network,
)  # fmt: skip
from tests.model.networks import DEEPSEEK_V2, LLAMA_8B, NETWORKS, PUBLISHED, SMALL


def test_llama_8b_by_hand():
    assert parameter_counts(LLAMA_8B) == {
        "embedding": 525_336_576,
        "attention": 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024),
        "mlp": 32 * 3 * 4096 * 14336,
        "experts": 0,
        "norms": 65 * 4096,
        "head": 525_336_576,
        "total": 8_030_261_248,  # as published
        "active": 8_030_261_248,
    }


@pytest.mark.parametrize("name", PUBLISHED)
def test_networks_with_experts_have_their_published_sizes(name: str):
    """Totals to the digit: tests/families/test_counts.py has transformers count them too."""
    values, total, active, without_embedding = PUBLISHED[name]
    counts = parameter_counts(ModelConfig.model_validate({**values, "tie_word_embeddings": False, "feed_forward": "moe"}))
    assert counts["total"] == total == sum(counts.values()) - counts["total"] - counts["active"]
    told = counts["active"] - (counts["embedding"] if without_embedding else 0)
    assert told / 1e9 == pytest.approx(active, abs=0.5 if isinstance(active, int) else 0.06)


def test_active_parameters_by_hand():
    """Two of eight experts in one layer of two, a shared one and the router."""
    network = ModelConfig(**SMALL, feed_forward="moe", moe_intermediate_size=24, first_k_dense_replace=1)
    counts, dense = parameter_counts(network), parameter_counts(ModelConfig(**SMALL))
    assert counts["experts"] == 8 * 3 * 24 * 32 and counts["mlp"] == 3 * 80 * 32 + 3 * 24 * 32 + 8 * 32
    assert counts["active"] == counts["total"] - 6 * 3 * 24 * 32
    assert counts["total"] - counts["experts"] - counts["mlp"] == dense["total"] - dense["mlp"]


def test_a_network_of_thousands_of_experts_is_planned_at_once():
    """DeepSeek-V3: 44,544 matrices of experts, in 174 stacks."""
    network = ModelConfig.model_validate({**PUBLISHED["DeepSeek-V3"][0], "feed_forward": "moe", "rms_norm_eps": 1.5e-6})
    begin = time.process_time()
    assert len(parameter_specs(network)) > 58 * 256 * 3
    assert time.process_time() - begin < 3
    biases = 58 * 256  # transformers counts them among its tensors
    assert sum(map(math.prod, full_shapes(network.model_copy(update={"tie_word_embeddings": False})).values())) - biases == (
        671_026_404_352
    )


@pytest.mark.parametrize(
    ("width", "heads", "q_lora_rank", "millions"), [(5120, 128, 1536, 149.2), (7168, 128, 1536, 187.1), (2048, 16, None, 13.8)]
)
def test_attention_parameters_of_deepseek(width, heads, q_lora_rank, millions):
    """V2, V3 and V2-Lite: parameters of one MLA layer as published."""
    config = DEEPSEEK_V2.model_copy(
        update={"hidden_size": width, "num_attention_heads": heads, "q_lora_rank": q_lora_rank, "num_hidden_layers": 1}
    )
    assert parameter_counts(config)["attention"] / 1e6 == pytest.approx(millions, abs=0.05)


def test_deepseek_v3_by_hand():
    """671 billion parameters, 37 billion of them active, as published; without the module that predicts further tokens."""
    config = ModelConfig(**DEEPSEEK_V3)
    attention = 187_107_328
    dense, expert, router = 3 * 7168 * 18432, 3 * 7168 * 2048, 256 * 7168
    rest = 61 * (attention + 2 * 7168) + 7168 + 3 * dense + 58 * router + 2 * 129280 * 7168
    assert parameter_counts(config)["total"] == rest + 58 * 257 * expert
    assert parameter_counts(config)["active"] == rest + 58 * 9 * expert
    assert round(parameter_counts(config)["active"] / 1e9, 1) == 37.6


def test_a_split_is_checked_in_layers_with_experts_too():
    config = ModelConfig(**DEEPSEEK_V3 | {"moe_intermediate_size": 2047})
    with pytest.raises(ValueError, match="moe_intermediate_size"):
        check_split(config, 2)


DEEPSEEK_V3 = dict(
    vocab_size=129280, hidden_size=7168, intermediate_size=18432, num_hidden_layers=61, num_attention_heads=128,
    attention="mla", q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
    feed_forward="moe", n_routed_experts=256, num_experts_per_tok=8, moe_intermediate_size=2048, first_k_dense_replace=3,
    tie_word_embeddings=False,
)  # fmt: skip


def test_every_rank_holds_its_share():
    specs, elements = parameter_specs(DEEPSEEK_V2, 8), elements_per_rank(DEEPSEEK_V2, 8)
    whole = [name for name, spec in specs.items() if spec.split is None]
    assert {name.split(".")[-2] for name in whole} == {
        "q_a_proj", "q_a_layernorm", "kv_a_proj_with_mqa", "kv_a_layernorm",
        "input_layernorm", "post_attention_layernorm", "norm",
    }  # fmt: skip
    assert all(elements[name] * (1 if name in whole else 8) == spec.elements for name, spec in specs.items())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_planned_network_is_the_network_without_values(name: str):
    config = NETWORKS[name]
    decoder = Decoder(config, PositionConfig(), 16, serial_kit())
    assert full_shapes(config) == {name: tuple(value.shape) for name, value in decoder.named_parameters()}
    assert list(elements_per_rank(config, 1).items()) == [(name, value.numel()) for name, value in decoder.named_parameters()]
    assert parameter_counts(config)["total"] == sum(value.numel() for value in decoder.parameters())
    assert {value.device.type for value in planned_network(config).state_dict().values()} == {"meta"}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_tensors_of_a_rank_have_the_elements_that_their_specs_say(name: str):
    held = {name: value.numel() for name, value in planned_network(NETWORKS[name], 2).named_parameters()}
    assert held == elements_per_rank(NETWORKS[name], 2) and held != elements_per_rank(NETWORKS[name], 1)


def test_kv_heads_that_ranks_do_not_divide_stay_whole():
    config, name = ModelConfig(num_attention_heads=4, num_key_value_heads=2), "model.layers.0.self_attn.k_proj.weight"
    whole = parameter_specs(config)[name].elements
    assert [elements_per_rank(config, size)[name] for size in (1, 2, 4)] == [whole, whole // 2, whole]


@pytest.mark.parametrize(
    ("values", "size", "sentence"),
    [
        ({}, 3, r"model\.vocab_size = 4096 is not divisible by parallel\.tensor_parallel_size = 3; set model\.pad_vocab"),
        ({"pad_vocab_to_multiple": 4100}, 3, r"vocab_size \(padded to a multiple of 4100\) = 4100 is not divisible"),
        ({"vocab_size": 96, "intermediate_size": 768}, 3, r"num_attention_heads = 4 is not divisible"),
        ({"num_attention_heads": 16, "intermediate_size": 40}, 16, r"intermediate_size = 40 is not divisible"),
        ({"num_attention_heads": 12, "hidden_size": 96, "num_key_value_heads": 6}, 4, "one must divide the other"),
    ],
)
def test_ranks_that_do_not_divide_a_network_are_refused(values: dict, size: int, sentence: str):
    config = ModelConfig(**values)
    check_split(config, 1)
    for refuse in (check_split, planned_network):
        with pytest.raises(ValueError, match=sentence):
            refuse(config, size)


def test_a_tied_head_has_no_parameters():
    assert parameter_counts(ModelConfig(tie_word_embeddings=True))["head"] == 0


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 10**9},
        {"hidden_size": 10**15},
        {"intermediate_size": 10**15},
        {"vocab_size": 10**15},
        {"num_hidden_layers": 3},
        {"intermediate_size": 4096},
    ],
)
def test_a_network_that_its_tensors_cannot_fill_is_refused_before_it_is_built(change: dict[str, int]):
    model = ModelConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
    held = full_shapes(model)
    check_held(model, held, "x")
    with pytest.raises(ValueError, match=r"^the configuration of x describes .* they do not belong together$"):
        check_held(model.model_copy(update=change), held, "x")
