"""Gemma 3's config.json."""

from model.huggingface.families import imported_config
from tests.model.huggingface.check import check_defaults, check_round_trips, refusal_of, stock_config


def test_defaults_are_those_of_transformers():
    check_defaults("gemma3_text")


def test_its_configurations_round_trip():
    check_round_trips("gemma3_text")


def test_bases_in_the_spelling_of_transformers_4():
    values = stock_config("gemma3_text", pad_token_id=0, num_hidden_layers=6)
    for key in ("rope_parameters", "layer_types"):
        del values[key]
    older = {"rope_theta": 5e5, "rope_local_base_freq": 5e3, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    model, position, length = imported_config({**values, **older, "sliding_window_pattern": 3}, "config.json")
    assert position == {"kind": "pi", "rope_theta": 5e5, "factor": 8.0, "windowed_rope_theta": 5e3} and length == 16
    assert model["full_attention_layers"] == [2, 5]


def test_what_it_does_not_compute_is_refused_by_name():
    for key, value in (
        ("final_logit_softcapping", 30.0),
        ("attn_logit_softcapping", 50.0),
        ("use_bidirectional_attention", True),
    ):
        assert f"config.json: {key} = {value}" in refusal_of("gemma3_text", **{key: value})
