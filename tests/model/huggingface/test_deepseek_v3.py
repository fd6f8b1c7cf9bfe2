"""DeepSeek V3's config.json."""

from model.huggingface.families import FAMILIES, imported_config
from tests.model.huggingface.check import check_defaults, check_round_trips, refusal_of, stock_config

ROUTED = {
    "feed_forward": "moe", "first_k_dense_replace": 3, "n_routed_experts": 256, "num_experts_per_tok": 8, "n_shared_experts": 1,
    "moe_intermediate_size": 2048, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "router_bias": True,
    "norm_topk_prob": True, "n_group": 8, "topk_group": 4,
}  # fmt: skip


def test_defaults_are_those_of_transformers():
    check_defaults("deepseek_v3")


def test_its_configurations_round_trip():
    check_round_trips("deepseek_v3")


def test_layers_of_experts_are_read():
    model, _, _ = imported_config(stock_config("deepseek_v3", num_key_value_heads=4), "config.json")
    assert {key: model[key] for key in ROUTED} == ROUTED


def test_what_its_router_does_not_compute_is_refused_by_name():
    for key, value in (("topk_method", "greedy"), ("scoring_func", "softmax"), ("moe_layer_freq", 2), ("hidden_act", "relu"),
                       ("n_group", 256), ("num_experts_per_tok", 257), ("num_local_experts", 8), ("n_shared_experts", 0),
                       ("routed_scaling_factor", 2)):  # fmt: skip
        assert f"config.json: {key} = {value!r} " in refusal_of("deepseek_v3", num_key_value_heads=4, **{key: value}), key


def test_files_may_have_layers_behind_the_network():
    family = FAMILIES["deepseek_v3"]
    assert [family.further_layers(values) for values in ({}, {"num_nextn_predict_layers": 2}, {"num_mtp_layers": 0})] == [
        1,
        2,
        0,
    ]
    assert FAMILIES["llama"].further_layers({"num_nextn_predict_layers": 2}) == 0


def test_what_it_does_not_compute_is_refused_by_name():
    dense = {"first_k_dense_replace": 4, "num_key_value_heads": 4}
    assert "rope_interleave = False" in refusal_of("deepseek_v3", **dense, rope_interleave=False)
    assert "num_key_value_heads = 2 must be num_attention_heads = 4" in refusal_of(
        "deepseek_v3", first_k_dense_replace=4, num_key_value_heads=2
    )
    assert imported_config({**stock_config("deepseek_v3"), **dense}, "config.json")[0]["latent_norm_eps"] == 1e-6
