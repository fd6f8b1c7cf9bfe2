"""What config.json says of experts, by each name of their number."""

import pytest

from model.config import ModelConfig
from model.huggingface.experts import read_count, read_groups, read_softmax_experts, written_experts
from model.huggingface.reader import ConfigReader


def reader(**values: object) -> ConfigReader:
    return ConfigReader({"num_experts_per_tok": 2, **values}, {"num_experts": 16}, "config.json")


def test_their_number_has_two_names():
    for values, count in (({}, 16), ({"num_experts": 4}, 4), ({"other": 8}, 8), ({"num_experts": 4, "other": 4}, 4)):
        assert read_count(reader(**values), "num_experts", "other") == {"n_routed_experts": count, "num_experts_per_tok": 2}
    with pytest.raises(ValueError, match=r"config.json: other = 8 is not num_experts = 4, and means the same"):
        read_count(reader(num_experts=4, other=8), "num_experts", "other")


def test_a_token_goes_to_at_most_all():
    with pytest.raises(ValueError, match=r"config.json: num_experts_per_tok = 17 is above num_experts = 16"):
        read_count(reader(num_experts_per_tok=17), "num_experts", "other")


def test_in_and_out_again():
    read = read_softmax_experts(reader(width=24), "num_experts", "other", "width")
    network = ModelConfig(feed_forward="moe", **read)
    assert written_experts(network, "num_experts", "width") == {"num_experts": 16, "num_experts_per_tok": 2, "width": 24}
    assert (network.scoring_func, network.router_bias, network.n_shared_experts) == ("softmax", False, 0)


def test_groups_must_hold_enough_experts():
    def groups(least: int, **values: int) -> dict[str, int]:
        keys = {"n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, **values}
        return read_groups(ConfigReader(keys, {}, "config.json"), least)

    assert groups(2) == {"n_group": 4, "topk_group": 2}
    assert groups(1, n_group=8, topk_group=3) == {"n_group": 8, "topk_group": 3}
    for values, sentence in (
        ({"n_group": 8, "topk_group": 3}, "n_group = 8 must divide n_routed_experts = 8 into groups of at least 2"),
        ({"n_group": 3}, "n_group = 3 must divide n_routed_experts = 8 into groups of at least 2"),
        ({"topk_group": 5}, "topk_group = 5 is above n_group = 4"),
        ({"topk_group": 1}, "topk_group = 1 of n_group = 4 groups have fewer experts than num_experts_per_tok = 3"),
    ):
        with pytest.raises(ValueError, match=f"config.json: {sentence}"):
            groups(2, **values)
