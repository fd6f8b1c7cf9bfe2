"""Mistral's config.json."""

from model.huggingface.families import imported_config
from tests.model.huggingface.check import check_defaults, check_round_trips, refusal_of, stock_config


def test_defaults_are_those_of_transformers():
    check_defaults("mistral")


def test_its_configurations_round_trip():
    check_round_trips("mistral")


def test_a_missing_window_is_the_class_default_and_null_is_none():
    values = stock_config("mistral")
    del values["sliding_window"]
    assert imported_config(values, "config.json")[0]["sliding_window"] == 4096
    assert "sliding_window" not in imported_config({**values, "sliding_window": None}, "config.json")[0]


def test_a_window_of_nothing_is_refused():
    assert "config.json: sliding_window = 0 must lie between 1 and" in refusal_of("mistral", sliding_window=0)
