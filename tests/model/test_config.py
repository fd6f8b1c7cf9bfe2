"""Configurations that contradict themselves are refused in one sentence; sizes derived from others."""

import pytest
from pydantic import ValidationError

from model.config import ModelConfig

MLA = {"attention": "mla", "kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"attention": "mla"}, "attention = 'mla' needs kv_lora_rank"),
        ({"head_dim": 7}, "head_dim = 7 must be even"),
        ({"num_attention_heads": 3, "hidden_size": 64}, "hidden_size = 64 is not divisible by num_attention_heads = 3"),
        ({"num_key_value_heads": 3}, "num_attention_heads = 4 must be a multiple of num_key_value_heads = 3"),
        ({"hidden_size": 33, "head_dim": 8}, "tied_head = 'half-swap' needs an even hidden_size"),
        ({"full_attention_layers": [0]}, "full_attention_layers needs sliding_window"),
        ({"sliding_window": 4, "full_attention_layers": [6]}, "the layers run from 0 to 5"),
        (MLA | {"qk_norm": "key-l2"}, "cannot be used with attention = 'mla'"),
        (MLA | {"qk_rope_head_dim": 3}, "qk_rope_head_dim = 3 must be even"),
    ],
)
def test_bad_models_are_refused_in_one_sentence(settings, sentence):
    with pytest.raises(ValidationError, match=sentence):
        ModelConfig(**settings)


def test_sizes_of_heads():
    grouped = ModelConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    assert (grouped.kv_heads, grouped.head_size, grouped.rotary_size, grouped.value_size) == (2, 16, 16, 16)
    latent = ModelConfig.model_validate(MLA)
    assert (latent.kv_heads, latent.head_size, latent.rotary_size, latent.value_size) == (4, 10, 4, 5)


def test_full_layers_count_from_either_end():
    config = ModelConfig(num_hidden_layers=4, sliding_window=8, full_attention_layers=[0, -1])
    assert [config.full_layer(layer) for layer in range(4)] == [True, False, False, True]
    assert all(ModelConfig().full_layer(layer) for layer in range(6))
