"""Curves thinned, smoothed and drawn."""

import math
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("matplotlib")  # a GPU machine without network may lack it

from launch.plots.figures import MAX_POINTS, Plot, smoothed, svg, thinned


@settings(deadline=None)
@given(st.integers(0, 4 * MAX_POINTS))
def test_thinning_keeps_the_mean_and_the_ends(count: int):
    x = list(range(count))
    thin_x, thin_y = thinned([float(value) for value in x], [2.0 * value for value in x])
    assert len(thin_x) == min(count, MAX_POINTS)
    np.testing.assert_allclose(thin_y, 2 * thin_x)


def test_thinning_and_smoothing_leave_holes_where_nothing_is_finite():
    y = [math.nan] * 3000 + [1.0] * 3000
    _, thin = thinned([float(value) for value in range(6000)], y)
    assert np.isnan(thin[0]) and thin[-1] == 1.0
    smooth = smoothed(np.array([math.nan] * 200 + [1.0, math.nan, 3.0] * 100))
    assert np.isnan(smooth[0]) and 1.0 <= smooth[-1] <= 3.0


def test_an_svg_is_well_formed():
    ElementTree.fromstring(svg(Plot("p", "A plot", "x", "y", [], [])))
