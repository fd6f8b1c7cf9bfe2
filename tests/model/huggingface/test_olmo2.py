"""OLMo 2's config.json."""

from model.huggingface.families import imported_config
from tests.model.huggingface.check import check_defaults, check_round_trips, refusal_of, stock_config


def test_defaults_are_those_of_transformers():
    check_defaults("olmo2")


def test_its_configurations_round_trip():
    check_round_trips("olmo2")


def test_norms_are_after_sublayers_and_over_all_heads():
    model, _, _ = imported_config(stock_config("olmo2", pad_token_id=0), "config.json")
    assert (model["norm_placement"], model["qk_norm"]) == ("post", "rms-all-heads")


def test_an_unknown_key_is_refused():
    assert "clip_qkv = 8 is not known to tiglon" in refusal_of("olmo2", clip_qkv=8)
