"""OLMo 3's config.json."""

from model.huggingface.families import imported_config
from tests.model.huggingface.check import check_defaults, check_round_trips, refusal_of, stock_config


def test_defaults_are_those_of_transformers():
    check_defaults("olmo3")


def test_its_configurations_round_trip():
    check_round_trips("olmo3")


def test_every_fourth_layer_is_full_unless_it_says_otherwise():
    values = stock_config("olmo3", pad_token_id=0)
    del values["layer_types"]
    model, position, _ = imported_config(values, "config.json")
    assert (model["sliding_window"], model["full_attention_layers"]) == (4096, [3])
    assert (position["rope_theta"], position["windowed_rope_theta"]) == (500000.0, 500000.0)


def test_scaling_of_windowed_layers_is_refused():
    rope = {"full_attention": None, "sliding_attention": {"rope_type": "linear", "factor": 2.0}}
    assert "rope_parameters.sliding_attention.rope_type = 'linear'" in refusal_of("olmo3", rope_parameters=rope)
