"""Qwen 2's config.json."""

from model.huggingface.families import imported_config
from tests.model.huggingface.check import check_defaults, check_round_trips, refusal_of, stock_config


def test_defaults_are_those_of_transformers():
    check_defaults("qwen2")


def test_its_configurations_round_trip():
    check_round_trips("qwen2")


def test_layers_below_max_window_layers_are_full():
    values = stock_config("qwen2", use_sliding_window=True, max_window_layers=3, num_hidden_layers=4)
    del values["layer_types"]
    model, _, _ = imported_config(values, "config.json")
    assert (model["attention_bias"], model["sliding_window"], model["full_attention_layers"]) == ("qkv", 4096, [0, 1, 2])


def test_windows_that_are_switched_off_are_refused_in_layer_types():
    types = ["full_attention"] * 3 + ["sliding_attention"]
    assert "layer_types" in refusal_of("qwen2", layer_types=types) and "use_sliding_window = false" in refusal_of(
        "qwen2", layer_types=types
    )
