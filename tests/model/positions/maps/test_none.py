"""No positions: no rotation at any distance."""

import torch

from model.positions.config import PositionConfig


def test_no_rotation_and_no_limit():
    none = PositionConfig(kind="none").map
    assert not none.rotates and not none.relative_position(torch.arange(9)).any() and none.usable_length(511.0) is None
