"""Which layers are full, and lists of them that mean nothing."""

import pytest
from pydantic import ValidationError

from model.attention.heads import AttentionConfig
from model.config import ModelConfig


def test_full_layers_count_from_either_end():
    config = AttentionConfig(num_hidden_layers=4, sliding_window=8, full_attention_layers=(0, -1))
    assert [config.full_layer(layer) for layer in range(4)] == [True, False, False, True]
    assert all(AttentionConfig().full_layer(layer) for layer in range(6))


def test_which_layers_are_rotated():
    windows = {"num_hidden_layers": 4, "sliding_window": 8, "full_attention_layers": (2,)}

    def rotated(**keys) -> list[bool]:
        config = AttentionConfig(**keys)
        return [config.rotated_layer(layer) for layer in range(config.num_hidden_layers)]

    assert rotated(**windows, layers_without_positions=(0, -1)) == [False, True, True, False]
    assert rotated(**windows, full_attention_position="none") == [True, True, False, True]
    assert rotated(num_hidden_layers=2, layers_without_positions=(-1,)) == [True, False]
    assert rotated(num_hidden_layers=2, full_attention_position="none") == [True, True]


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"full_attention_layers": [0]}, "full_attention_layers needs sliding_window"),
        ({"sliding_window": 4, "full_attention_layers": [6]}, "the layers run from 0 to 5"),
        ({"layers_without_positions": [6]}, "layers_without_positions has 6, but the layers run from 0 to 5"),
        ({"layers_without_positions": [-7]}, "layers_without_positions has -7, but the layers run from 0 to 5"),
        ({"head_dim": 7}, "head_dim = 7 must be even"),
    ],
)
def test_what_means_nothing_is_refused(settings: dict, sentence: str):
    with pytest.raises(ValidationError, match=sentence):
        ModelConfig(**settings)
