"""RoPE: the distance itself."""

import torch

from model.positions.config import PositionConfig


def test_rotation_by_the_distance():
    assert torch.equal(PositionConfig().map.relative_position(torch.arange(9)), torch.arange(9).double())
    torch.testing.assert_close(PositionConfig(rope_theta=1e4).map.frequencies(4, 1), torch.tensor([1, 0.01]).double())
