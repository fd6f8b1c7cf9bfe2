"""Llama's config.json."""

from model.huggingface.families import imported_config
from tests.model.huggingface.check import check_defaults, check_round_trips, refusal_of, stock_config


def test_defaults_are_those_of_transformers():
    check_defaults("llama")


def test_its_configurations_round_trip():
    check_round_trips("llama")


def test_a_bias_of_attention_is_of_all_projections():
    model, _, _ = imported_config(stock_config("llama", attention_bias=True), "config.json")
    assert (model["attention_bias"], model["mlp_bias"]) == ("all", False)


def test_what_it_does_not_compute_is_refused_by_name():
    assert "hidden_act = 'gelu' is nothing that tiglon computes here; it computes silu, gelu_pytorch_tanh" in refusal_of(
        "llama", hidden_act="gelu"
    )
    assert "hidden_size = 66 is no multiple of num_attention_heads = 4" in refusal_of("llama", hidden_size=66)
    assert "attention_dropout = 0.1" in refusal_of("llama", attention_dropout=0.1)
