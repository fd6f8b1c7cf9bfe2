"""The two limits of the leak."""

import torch

from model.positions.config import PositionConfig


def test_leak_of_one_is_rope_and_a_large_one_rerope():
    r = torch.arange(100)
    torch.testing.assert_close(PositionConfig(kind="leaky-rerope", window=7, leak=1).map.relative_position(r), r.double())
    almost = PositionConfig(kind="leaky-rerope", window=7, leak=1e12).map.relative_position(r)
    torch.testing.assert_close(almost, PositionConfig(kind="rerope", window=7).map.relative_position(r), rtol=0, atol=1e-9)
