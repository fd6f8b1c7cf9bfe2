"""SmolLM3's config.json."""

from model.huggingface.families import imported_config
from tests.model.huggingface.check import check_defaults, check_round_trips, refusal_of, stock_config


def test_defaults_are_those_of_transformers():
    check_defaults("smollm3")


def test_its_configurations_round_trip():
    check_round_trips("smollm3")


def test_one_means_rotated_in_no_rope_layers():
    values = stock_config("smollm3", pad_token_id=0, no_rope_layers=[1, 0, 1, 1])
    assert imported_config(values, "config.json")[0]["layers_without_positions"] == [1]
    del values["no_rope_layers"]
    assert imported_config(values, "config.json")[0]["layers_without_positions"] == [3], "every fourth"


def test_a_list_of_other_numbers_is_refused():
    assert "no_rope_layers = [1, 2, 1, 1] must be a list of 1 (rotated) and 0" in refusal_of(
        "smollm3", no_rope_layers=[1, 2, 1, 1]
    )
    assert "no_rope_layers" in refusal_of("smollm3", no_rope_layers=[1])
