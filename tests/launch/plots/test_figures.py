"""Curves thinned, smoothed and drawn."""

import itertools
import math
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("matplotlib")  # a GPU machine without network may lack it

from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from launch.plots.figures import COLOURS, MAX_POINTS, Bars, Curve, Plot, smoothed, svg, thinned


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


def _legend_and_axes(figure: Figure) -> tuple[Bbox, Bbox]:
    """What they cover, in pixels, labels of the axes included."""
    figure.draw_without_rendering()
    (legend,), (axes,) = figure.legends, figure.axes
    covered = axes.get_tightbbox()
    assert covered is not None
    return legend.get_window_extent(), covered


NAMES = {"short": "run", "long": "a-rather-long-name-of-a-run-with-many-keys-in-it-and-their-values"}


@pytest.mark.parametrize("runs", [1, 2, 5, 10])
@pytest.mark.parametrize("name", NAMES)
def test_a_legend_covers_nothing(runs: int, name: str):
    """Of curves and of bars; it lies inside the figure, whose axes keep their size."""
    labels = [f"{NAMES[name]}-{index}" for index in range(runs)]
    curves = [Curve(label, colour, [1.0, 2.0], [1.0, 2.0]) for label, colour in zip(labels, COLOURS)]
    marks = [Curve(part, COLOURS[0], [1.0], [1.0]) for part in ("validation at 256 tokens", "contexts at 1,024 tokens")]
    kinds = ("data", "forward", "backward", "optimizer", "save", "evaluate")
    bars = Bars("time", "Time", [(label, dict.fromkeys(kinds, 1 / 6)) for label in labels])
    for plot, least in ((Plot("loss", "Loss", "x", "y", curves, marks), 2.5), (bars, 0.3 * runs)):
        figure = plot.figure()
        legend, axes = _legend_and_axes(figure)
        assert not legend.overlaps(axes)
        assert figure.bbox.x0 <= legend.x0 and legend.x1 <= figure.bbox.x1 and figure.bbox.y0 <= legend.y0
        assert axes.height / figure.dpi > least


def test_every_run_and_every_kind_of_mark_stands_in_the_legend_once():
    runs = [Curve(f"run {index}", COLOURS[index], [1.0], [1.0]) for index in range(3)]
    marks = [Curve(part, run.colour, [1.0], [1.0]) for run in runs for part in ("validation", "contexts")]
    figure = Plot("loss", "Loss", "x", "y", runs, marks).figure()
    (legend,) = figure.legends
    assert sorted(text.get_text() for text in legend.get_texts()) == ["contexts", "run 0", "run 1", "run 2", "validation"]
    shapes = {line.get_marker() for line in figure.axes[0].get_lines() if line.get_marker() not in (".", "None")}
    assert len(shapes) == 2


def test_colours_of_ten_runs_are_told_apart():
    """Distances in CIE L*a*b*; the closest of an earlier list were 7 apart."""
    assert len(COLOURS) == 10
    colours = [_lab(np.array(to_rgb(colour))) for colour in COLOURS]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(colours, 2)) > 25
    assert all(colour[0] < 70 for colour in colours), "dark enough for white paper"


def _lab(rgb: np.ndarray) -> np.ndarray:
    """CIE L*a*b* of an sRGB colour, D65."""
    linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear / [0.9505, 1, 1.089]
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ([6.0, 3.0], "linear"), ([1e-3, 1e18], "log"), ([0.0, 1.0, 1e6], "log"), ([-1.0, 1e6], "linear"),
        ([math.nan, 1.0], "linear"),
    ],
)  # fmt: skip
def test_values_far_apart_have_a_logarithmic_axis(values: list[float], scale: str):
    curve = Curve("run", "red", [float(step) for step in range(len(values))], values)
    assert Plot("p", "P", "step", "", [curve], []).figure().axes[0].get_yscale() == scale


def test_steps_are_whole_numbers():
    """A run of one record had ticks as 960m, thousandths of a step."""
    figure = Plot("p", "P", "step", "", [Curve("run", "red", [1.0], [5.0])], []).figure()
    figure.draw_without_rendering()
    assert all(label.get_text().lstrip("−").isdigit() for label in figure.axes[0].get_xticklabels())
