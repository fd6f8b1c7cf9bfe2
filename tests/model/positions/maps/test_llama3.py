"""Llama 3.1's frequencies against transformers; logits as they are, and no length beyond training."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from model.positions.config import PositionConfig


@pytest.mark.parametrize("own", [{}, {"low_freq_factor": 2.0, "high_freq_factor": 9.0}], ids=["defaults", "own"])
def test_frequencies_are_those_of_transformers(own: dict):
    """transformers reads what the map writes for it; all three parts of the ramp hold frequencies."""
    position = PositionConfig(kind="llama3", rope_theta=5e3, factor=8.0, **own)
    written = position.map.rope_parameters("gqa", 64, 512)
    theirs = LlamaConfig(hidden_size=256, num_attention_heads=4, max_position_embeddings=4096, rope_parameters=written)
    want, factor = ROPE_INIT_FUNCTIONS["llama3"](theirs, "cpu")
    got = position.map.frequencies(64, 512)
    torch.testing.assert_close(got.float(), want, rtol=1e-6, atol=0)
    assert factor == position.map.query_scale() == 1
    share = got / PositionConfig(rope_theta=5e3).map.frequencies(64, 512)
    assert (share == 1).any() and (share == 1 / 8).any() and ((share > 0.13) & (share < 0.99)).sum() >= 3


def test_the_whole_length_was_trained():
    position = PositionConfig(kind="llama3", factor=8.0, trained_length=64)
    assert position.usable_length(position, 512) == 512
