"""Parameters counted from sizes against hand counts, published numbers and the network itself."""

from importlib import import_module

import pytest

from model.config import ModelConfig
from model.decoder import Decoder
from model.parallel.layers import serial_kit
from model.parameters import ParameterSpec, all_parameters, elements_per_rank, local_slice, parameter_counts, set_spec
from model.positions.config import PositionConfig
from tests.model.libraries import relied_on
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
    split = [tensor for tensor in all_parameters(DEEPSEEK_V2) if tensor.split is not None]
    whole = [tensor for tensor in all_parameters(DEEPSEEK_V2) if tensor.split is None]
    assert {tensor.name.split(".")[-2] for tensor in whole} == {
        "q_a_proj", "q_a_layernorm", "kv_a_proj_with_mqa", "kv_a_layernorm",
        "input_layernorm", "post_attention_layernorm", "norm",
    }  # fmt: skip
    assert all(tensor.elements_per_rank(8) * 8 == tensor.elements for tensor in split)
    assert all(tensor.elements_per_rank(8) == tensor.elements for tensor in whole)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_of_the_decoder_is_listed(name):
    config = NETWORKS[name]
    decoder = Decoder(config, PositionConfig(), 16, serial_kit())
    shapes = {name: tuple(value.shape) for name, value in decoder.named_parameters()}
    assert shapes == {tensor.name: tensor.shape for tensor in all_parameters(config)}
    assert parameter_counts(config)["total"] == sum(value.numel() for value in decoder.parameters())


def test_elements_per_rank_come_in_the_order_of_the_network():
    config = NETWORKS["mla"]
    decoder = Decoder(config, PositionConfig(), 16, serial_kit())
    halved = {tensor.name for tensor in all_parameters(config) if tensor.split is not None}
    assert elements_per_rank(config, 1) == [value.numel() for value in decoder.parameters()]
    want = [value.numel() // (2 if name in halved else 1) for name, value in decoder.named_parameters()]
    assert elements_per_rank(config, 2) == want


def test_kv_heads_that_ranks_do_not_divide_stay_whole():
    config = ModelConfig(num_attention_heads=4, num_key_value_heads=2)
    k_proj = next(tensor for tensor in all_parameters(config) if "k_proj" in tensor.name)
    assert [k_proj.elements_per_rank(size) for size in (1, 2, 4)] == [k_proj.elements, k_proj.elements // 2, k_proj.elements]


def test_a_tied_head_has_no_parameters():
    assert parameter_counts(ModelConfig(tie_word_embeddings=True))["head"] == 0


def test_local_slices_tile_the_tensor():
    assert local_slice(serial_kit().column(6, 8).weight.spec, 2, 1) == ((8, 6), (0, 0)), "one device splits nothing"
    rows, columns = ParameterSpec("matrix", (8, 6), 0), ParameterSpec("matrix", (8, 6), 1)
    assert [local_slice(rows, 4, rank) for rank in range(4)] == [((2, 6), (2 * rank, 0)) for rank in range(4)]
    assert local_slice(columns, 2, 1) == ((8, 3), (0, 3))


def megatron_flag_reaches_deepspeed() -> None:
    use = "model.parameters marks split parameters so that norms count them on every tensor-parallel rank"
    with relied_on("deepspeed", "the flag tensor_model_parallel of a parameter", use):
        utils = import_module("deepspeed.runtime.utils")
        whole, split = serial_kit().norm(4, 1e-5).weight, serial_kit().norm(4, 1e-5).weight
        set_spec(split, "gain", (8,), 0)
        assert utils.is_model_parallel_parameter(split) and not utils.is_model_parallel_parameter(whole)


def test_megatrons_flag_reaches_deepspeed():
    megatron_flag_reaches_deepspeed()


def test_a_deepspeed_without_megatrons_flag_is_seen(monkeypatch: pytest.MonkeyPatch):
    utils = import_module("deepspeed.runtime.utils")
    monkeypatch.setattr(utils, "is_model_parallel_parameter", lambda parameter: getattr(parameter, "renamed", False))
    with pytest.raises(pytest.fail.Exception, match=r"^deepspeed [\w.+]+: the flag tensor_model_parallel .*every tensor.*$"):
        megatron_flag_reaches_deepspeed()
