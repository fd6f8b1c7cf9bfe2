"""What all kinds of attention have in common: heads are divided over ranks, scores are counted, an interface is kept."""

import pytest

from model.attention.base import Attention
from model.config import ATTENTION, ModelConfig
from model.parallel.layers import Kit, serial_kit
from tests.model.networks import NETWORKS


def test_heads_that_do_not_divide_over_ranks_are_refused():
    with pytest.raises(ValueError, match=r"num_attention_heads = 4 is not divisible by parallel\.tensor_parallel_size = 3"):
        ATTENTION["gqa"](ModelConfig(), 0, Kit(size=3))


@pytest.mark.parametrize("kind", ATTENTION)
def test_every_kind_answers_the_whole_interface(kind: str):
    """What a kind does not say it inherits from Attention, which refuses to answer."""
    stated = {name for base in ATTENTION[kind].__mro__[: -len(Attention.__mro__)] for name in vars(base)}
    assert {"section", "head_sizes", "describe", "project", "queries", "keys", "forward", "kept", "logit_rows"} <= stated


@pytest.mark.parametrize("name", NETWORKS)
def test_scores_of_each_layer_are_counted_one_by_one(name: str):
    config, length = NETWORKS[name].model_copy(update={"sliding_window": 5, "full_attention_layers": (1,)}), 12
    for layer, window in ((0, 5), (1, length)):
        attention = ATTENTION[config.attention](config, layer, serial_kit())
        seen = sum(1 for i in range(length) for j in range(i + 1) if i - j < window)
        each = 2 * config.num_attention_heads * (config.head_size + config.value_size)
        assert attention.score_flops(length, causal=True) == pytest.approx(each * seen / length)
        assert attention.score_flops(length, causal=False) == each * window
