"""DeepSeek V2's config.json."""

from model.huggingface.families import imported_config
from tests.model.huggingface.check import check_defaults, check_round_trips, refusal_of, stock_config


def test_defaults_are_those_of_transformers():
    check_defaults("deepseek_v2")


def test_its_configurations_round_trip():
    check_round_trips("deepseek_v2")


def test_a_network_with_experts_is_refused():
    assert "first_k_dense_replace = 0 leaves layers of experts (num_hidden_layers = 4)" in refusal_of("deepseek_v2")


def test_its_mlp_may_have_biases():
    values = stock_config("deepseek_v2", first_k_dense_replace=4, num_key_value_heads=4, mlp_bias=True)
    assert imported_config(values, "config.json")[0]["mlp_bias"] is True
