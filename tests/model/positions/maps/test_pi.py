"""Position interpolation."""

import torch

from model.positions.config import PositionConfig


def test_distances_are_divided_by_the_factor():
    got = PositionConfig(kind="pi", factor=4).map.relative_position(torch.tensor([0, 1, 6]))
    assert got.tolist() == [0.0, 0.25, 1.5]
