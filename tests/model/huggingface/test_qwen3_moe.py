"""Qwen 3 with experts's config.json."""

from model.huggingface.families import imported_config
from tests.model.huggingface.check import check_defaults, check_round_trips, refusal_of, stock_config


def test_defaults_are_those_of_transformers():
    check_defaults("qwen3_moe")


def test_its_configurations_round_trip():
    check_round_trips("qwen3_moe")


def test_all_layers_have_experts_and_one_window_or_none():
    model, _, _ = imported_config(stock_config("qwen3_moe"), "config.json")
    assert (model["qk_norm"], model["first_k_dense_replace"], model["moe_intermediate_size"]) == ("rms", 0, 768)
    assert "sliding_window" not in model, "use_sliding_window is false"
    windowed = {**stock_config("qwen3_moe"), "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
    model, _, _ = imported_config(windowed, "config.json")
    assert model["sliding_window"] == 8 and "full_attention_layers" not in model, "max_window_layers counts for nothing"


def test_only_the_first_layers_may_be_dense():
    values = {**stock_config("qwen3_moe"), "mlp_only_layers": [1, 0]}
    assert imported_config(values, "config.json")[0]["first_k_dense_replace"] == 2
    for layers in ([1], [0, 2], [0, 1, 2, 3], [True], ["0"], "0", 3):
        assert "config.json: mlp_only_layers = " in refusal_of("qwen3_moe", mlp_only_layers=layers), layers
    assert "config.json: decoder_sparse_step = 2 is nothing" in refusal_of("qwen3_moe", decoder_sparse_step=2)
