"""OLMoE's config.json."""

from model.huggingface.families import imported_config
from tests.model.huggingface.check import check_defaults, check_round_trips, refusal_of, stock_config


def test_defaults_are_those_of_transformers():
    check_defaults("olmoe")


def test_its_configurations_round_trip():
    check_round_trips("olmoe")


def test_norms_are_before_sublayers_and_over_all_heads():
    model, _, _ = imported_config(stock_config("olmoe", pad_token_id=0), "config.json")
    assert (model["qk_norm"], model["norm_topk_prob"], model["moe_intermediate_size"]) == ("rms-all-heads", False, 112)
    assert "norm_placement" not in model


def test_what_it_does_not_compute_is_refused_by_name():
    assert "config.json: clip_qkv = 8.0 is nothing that tiglon computes here; it computes null" in refusal_of(
        "olmoe", clip_qkv=8.0
    )
    assert "config.json: head_dim = 24 is nothing" in refusal_of("olmoe", head_dim=24)
