"""Sizes of networks that do not exist against hand counts, published numbers and networks that do."""

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
from tests.model.networks import DEEPSEEK_V2, LLAMA_8B, NETWORKS


def test_llama_8b_by_hand():
    assert parameter_counts(LLAMA_8B) == {
        "embedding": 525_336_576,
        "attention": 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024),
        "mlp": 32 * 3 * 4096 * 14336,
        "norms": 65 * 4096,
        "head": 525_336_576,
        "total": 8_030_261_248,  # as published
    }


@pytest.mark.parametrize(
    ("width", "heads", "q_lora_rank", "millions"), [(5120, 128, 1536, 149.2), (7168, 128, 1536, 187.1), (2048, 16, None, 13.8)]
)
def test_attention_parameters_of_deepseek(width, heads, q_lora_rank, millions):
    """V2, V3 and V2-Lite: parameters of one MLA layer as published."""
    config = DEEPSEEK_V2.model_copy(
        update={"hidden_size": width, "num_attention_heads": heads, "q_lora_rank": q_lora_rank, "num_hidden_layers": 1}
    )
    assert parameter_counts(config)["attention"] / 1e6 == pytest.approx(millions, abs=0.05)


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
