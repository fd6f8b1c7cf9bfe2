"""DeepSeek V3's config.json."""

from model.huggingface.families import imported_config
from tests.model.huggingface.check import check_defaults, check_round_trips, refusal_of, stock_config


def test_defaults_are_those_of_transformers():
    check_defaults("deepseek_v3")


def test_its_configurations_round_trip():
    check_round_trips("deepseek_v3")


def test_a_network_with_experts_is_refused():
    assert "first_k_dense_replace = 3 leaves layers of experts (num_hidden_layers = 4)" in refusal_of(
        "deepseek_v3", first_k_dense_replace=3
    )


def test_what_it_does_not_compute_is_refused_by_name():
    dense = {"first_k_dense_replace": 4, "num_key_value_heads": 4}
    assert "rope_interleave = False" in refusal_of("deepseek_v3", **dense, rope_interleave=False)
    assert "num_key_value_heads = 2 must be num_attention_heads = 4" in refusal_of(
        "deepseek_v3", first_k_dense_replace=4, num_key_value_heads=2
    )
    assert imported_config({**stock_config("deepseek_v3"), **dense}, "config.json")[0]["latent_norm_eps"] == 1e-6
