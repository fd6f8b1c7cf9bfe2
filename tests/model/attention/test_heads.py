"""Which layers are full, and lists of them that mean nothing."""

import pytest
from pydantic import ValidationError

from model.attention.heads import AttentionConfig
from model.config import ModelConfig


def test_full_layers_count_from_either_end():
    config = AttentionConfig(num_hidden_layers=4, sliding_window=8, full_attention_layers=(0, -1))
    assert [config.full_layer(layer) for layer in range(4)] == [True, False, False, True]
    assert all(AttentionConfig().full_layer(layer) for layer in range(6))


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"full_attention_layers": [0]}, "full_attention_layers needs sliding_window"),
        ({"sliding_window": 4, "full_attention_layers": [6]}, "the layers run from 0 to 5"),
        ({"head_dim": 7}, "head_dim = 7 must be even"),
    ],
)
def test_what_means_nothing_is_refused(settings: dict, sentence: str):
    with pytest.raises(ValidationError, match=sentence):
        ModelConfig(**settings)
