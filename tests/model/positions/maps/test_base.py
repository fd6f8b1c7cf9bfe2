"""What holds of every map's relative positions."""

import math

import torch

from tests.model.oracle import MAPS


def test_relative_position_is_continuous_and_rises():
    for position in MAPS.values():
        steps = position.map.relative_position(torch.arange(300)).diff()
        assert (steps >= 0).all()
        assert steps.max() <= 16 + 1e-9
    assert math.isclose(float(MAPS["inverse"].map.relative_position(torch.tensor(5))), 5.0)
