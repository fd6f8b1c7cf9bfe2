"""Qwen 3's config.json."""

from model.huggingface.families import imported_config
from tests.model.huggingface.check import check_defaults, check_round_trips, refusal_of, stock_config


def test_defaults_are_those_of_transformers():
    check_defaults("qwen3")


def test_its_configurations_round_trip():
    check_round_trips("qwen3")


def test_a_missing_head_width_is_the_class_default():
    values = stock_config("qwen3")
    del values["head_dim"]
    model, _, _ = imported_config(values, "config.json")
    assert (model["head_dim"], model["qk_norm"]) == (128, "rms"), "not hidden_size / heads"


def test_unknown_layer_types_are_refused():
    assert "has 'chunked_attention'; tiglon has full and sliding attention" in refusal_of(
        "qwen3", use_sliding_window=True, sliding_window=8, layer_types=["chunked_attention"] * 4
    )
