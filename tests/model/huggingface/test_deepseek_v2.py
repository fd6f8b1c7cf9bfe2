"""DeepSeek V2's config.json."""

from model.huggingface.families import imported_config
from tests.model.huggingface.check import check_defaults, check_round_trips, refusal_of, stock_config


def test_defaults_are_those_of_transformers():
    check_defaults("deepseek_v2")


def test_its_configurations_round_trip():
    check_round_trips("deepseek_v2")


def test_groups_count_where_the_method_has_them():
    routed = {"num_key_value_heads": 4, "num_experts_per_tok": 6, "n_group": 8, "topk_group": 3}
    for method, groups in (("greedy", (1, 1)), ("group_limited_greedy", (8, 3))):
        values = stock_config("deepseek_v2", **routed, topk_method=method)
        model, _, _ = imported_config(values, "config.json")
        assert (model["n_group"], model["topk_group"]) == groups, method
        assert (model["scoring_func"], model["router_bias"], model["first_k_dense_replace"]) == ("softmax", False, 0)


def test_what_its_router_does_not_compute_is_refused_by_name():
    """transformers 5 passes over norm_topk_prob, DeepSeek's own code does not."""
    routed = {"num_key_value_heads": 4, "num_experts_per_tok": 6}
    for key, value in (("topk_method", "noaux_tc"), ("norm_topk_prob", True), ("scoring_func", "sigmoid"),
                       ("moe_layer_freq", 2), ("num_experts_per_tok", 65), ("num_experts", 32),
                       ("n_shared_experts", 0)):  # fmt: skip
        assert f"config.json: {key} = {value!r} " in refusal_of("deepseek_v2", **{**routed, key: value}), key
    assert "num_experts_per_tok is missing or null" in refusal_of("deepseek_v2", num_key_value_heads=4)


def test_its_mlp_may_have_biases():
    values = stock_config("deepseek_v2", first_k_dense_replace=4, num_key_value_heads=4, mlp_bias=True)
    assert imported_config(values, "config.json")[0]["mlp_bias"] is True
