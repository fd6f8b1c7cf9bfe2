"""Phi 3's config.json."""

from model.huggingface.families import imported_config
from tests.model.huggingface.check import check_defaults, check_round_trips, refusal_of, stock_config


def test_defaults_are_those_of_transformers():
    check_defaults("phi3")


def test_its_configurations_round_trip():
    check_round_trips("phi3")


def test_longrope_is_refused():
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "long_factor": [1.0] * 8, "short_factor": [1.0] * 8}
    assert "rope_parameters.rope_type = 'longrope'" in refusal_of("phi3", rope_parameters=rope)
    assert "rope_parameters" in refusal_of("phi3", rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0})
    partial = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}
    assert "partial_rotary_factor = 0.75" in refusal_of("phi3", rope_parameters=partial)
    assert imported_config(stock_config("phi3"), "config.json")[1]["kind"] == "rope"
