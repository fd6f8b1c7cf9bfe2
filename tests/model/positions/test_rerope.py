"""Relative positions of every map, and the lengths they can be evaluated at."""

import math

import pytest
import torch

from model.positions.config import PositionConfig
from model.positions.rerope import relative_position, usable_length
from tests.model.oracle import MAPS


def test_leak_of_one_is_rope_and_a_large_one_rerope():
    r = torch.arange(100)
    torch.testing.assert_close(relative_position(PositionConfig(kind="leaky-rerope", window=7, leak=1), r), r.double())
    almost = relative_position(PositionConfig(kind="leaky-rerope", window=7, leak=1e12), r)
    torch.testing.assert_close(almost, relative_position(PositionConfig(kind="rerope", window=7), r), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "evaluated, trained, length",
    [
        (PositionConfig(), PositionConfig(), 512),
        (PositionConfig(kind="pi", factor=8), PositionConfig(), 511 * 8 + 1),
        (PositionConfig(kind="rerope", window=256), PositionConfig(), None),
        (PositionConfig(kind="rerope", window=512), PositionConfig(), 512),
        (PositionConfig(kind="leaky-rerope", window=128, leak=16), PositionConfig(), 128 + 383 * 16 + 1),
        (PositionConfig(), PositionConfig(kind="leaky-rerope", window=128, leak=1 / 16), 6257),
        (PositionConfig(kind="none"), PositionConfig(kind="none"), None),
    ],
)
def test_usable_length(evaluated, trained, length):
    """Trained at 512; inverse Leaky w = 128, k = 1/16 meets distances up to 6,256 (Su 2023, kexue.fm/archives/9728)."""
    assert usable_length(evaluated, trained, 512) == length


def test_relative_position_is_continuous_and_rises():
    for position in MAPS.values():
        steps = relative_position(position, torch.arange(300)).diff()
        assert (steps >= 0).all()
        assert steps.max() <= 16 + 1e-9
    assert math.isclose(float(relative_position(MAPS["inverse"], torch.tensor(5))), 5.0)
