"""Every context extension can be used at factor times the trained length."""

import pytest

from model.positions.config import PositionConfig


@pytest.mark.parametrize("kind", ["pi", "ntk", "ntk-mixed", "yarn"])
def test_usable_length_grows_by_the_factor(kind):
    assert PositionConfig(kind=kind, factor=8).usable_length(PositionConfig(), 512) == 511 * 8 + 1
