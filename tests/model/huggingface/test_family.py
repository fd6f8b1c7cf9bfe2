"""What families share: keys that change nothing, heads and windows in and out."""

import transformers

from model.config import ModelConfig
from model.huggingface.family import (
    COMMON_DEFAULTS,
    HARMLESS,
    SAMPLING,
    read_heads,
    read_switched_windows,
    read_windows,
    written_heads,
    written_switched_windows,
    written_windows,
)
from model.huggingface.reader import ConfigReader

SIZES = {"hidden_size": 64, "num_attention_heads": 4}


def reader(**values) -> ConfigReader:
    return ConfigReader({**SIZES, **values}, {}, "config.json")


def test_every_default_of_generation_is_known_to_be_harmless():
    theirs = set(transformers.GenerationConfig._get_default_generation_params())
    assert theirs <= SAMPLING | HARMLESS
    assert not HARMLESS & COMMON_DEFAULTS.keys() and not SAMPLING & COMMON_DEFAULTS.keys()


def test_heads_in_and_out():
    assert read_heads(reader(num_key_value_heads=2)) == {"num_key_value_heads": 2, "head_dim": 16}
    assert read_heads(reader(head_dim=24, num_key_value_heads=None)) == {"num_key_value_heads": 4, "head_dim": 24}
    assert written_heads(ModelConfig(hidden_size=64)) == {"num_key_value_heads": 4, "head_dim": 16}


def test_windows_in_and_out():
    kinds = ["sliding_attention", "full_attention"]
    model = read_windows(reader(sliding_window=8), 2, kinds)
    assert model == {"sliding_window": 8, "full_attention_layers": [1]}
    network = ModelConfig(num_hidden_layers=2, sliding_window=8, full_attention_layers=(1,))
    assert written_windows(network) == {"sliding_window": 8, "layer_types": kinds}
    assert read_windows(reader(sliding_window=8, layer_types=["full_attention"] * 2), 2, kinds) == {}


def test_windows_that_are_switched_off():
    assert read_switched_windows(reader(sliding_window=8, use_sliding_window=False), ["sliding_attention"]) == {}
    network = ModelConfig(num_hidden_layers=1)
    assert written_switched_windows(network) == {
        "sliding_window": None, "layer_types": ["full_attention"], "use_sliding_window": False,
    }  # fmt: skip
