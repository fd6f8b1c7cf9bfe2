"""Mixtral's config.json."""

from model.huggingface.families import FAMILIES, imported_config
from tests.model.huggingface.check import check_defaults, check_round_trips, refusal_of, stock_config


def test_defaults_are_those_of_transformers():
    check_defaults("mixtral")


def test_its_configurations_round_trip():
    check_round_trips("mixtral")


def test_weights_add_to_one_and_no_layer_is_dense():
    model, position, _ = imported_config(stock_config("mixtral"), "config.json")
    assert (model["norm_topk_prob"], model["moe_intermediate_size"], model["n_routed_experts"]) == (True, 112, 8)
    assert "first_k_dense_replace" not in model and position["rope_theta"] == 1e6


def test_noise_of_its_router_is_refused():
    assert "config.json: router_jitter_noise = 0.1 is nothing that tiglon computes here" in refusal_of(
        "mixtral", router_jitter_noise=0.1
    )
    assert "config.json: num_experts_per_tok = 9 is above num_local_experts = 8" in refusal_of("mixtral", num_experts_per_tok=9)


def test_names_of_its_experts():
    name = FAMILIES["mixtral"].stored_name
    assert name("model.layers.3.mlp.gate.weight") == "model.layers.3.block_sparse_moe.gate.weight"
    for ours, theirs in (("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3")):
        stored = f"model.layers.3.block_sparse_moe.experts.7.{theirs}.weight"
        assert name(f"model.layers.3.mlp.experts.7.{ours}.weight") == stored
    assert name("model.layers.3.self_attn.o_proj.weight") == "model.layers.3.self_attn.o_proj.weight"


def test_yarn_wants_the_width_of_heads():
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    assert "wants a head_dim, which is missing or null" in refusal_of("mixtral", rope_scaling=scaling)
    assert refusal_of("mixtral", rope_scaling=scaling, head_dim=16) == "imported"
