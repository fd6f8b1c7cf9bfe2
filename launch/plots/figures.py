"""Curves of runs as matplotlib figures, without pyplot and its global state."""

import io
import itertools
import math
import re
from dataclasses import dataclass
from typing import Any, Protocol

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from trainer.printable import printable

COLOURS = ("#0b6e99", "#e07a10", "#3f8f4f", "#9065b0", "#c9302c", "#787774", "#22b3c7", "#a8a11e", "#e06ab8", "#6b3f1d")
PLAIN_TEXT: Any = {"text.parse_math": False}
"""For matplotlib: a $ in the name of a run or a corpus is no formula."""
SHAPES = "os^Dv"
"""Of marks."""
LOG_FROM = 100.0
LABEL_CHARACTERS = 40
_LEGEND_FONT = 8
_LEGEND_ROW = 0.17
"""Inches."""
MAX_POINTS = 1500
"""Points per curve; more are averaged in buckets, so that the page of a long run still opens at once."""


@dataclass(frozen=True)
class Curve:
    """One line of a plot."""

    label: str
    colour: str
    x: list[float]
    y: list[float]


@dataclass(frozen=True)
class Plot:
    """A figure with `curves` as lines and `marks` as dots joined by a thin line.

    A curve is known by its colour, a mark by its shape: all marks of a label have the same one. Where positive values differ by
    a factor above LOG_FROM the y axis is logarithmic.
    """

    name: str
    title: str
    x_label: str
    y_label: str
    curves: list[Curve]
    marks: list[Curve]
    smooth: bool = False

    @property
    def empty(self) -> bool:
        """Whether there is no finite value to draw."""
        return not any(math.isfinite(y) for curve in (*self.curves, *self.marks) for y in curve.y)

    @matplotlib.rc_context(PLAIN_TEXT)
    def figure(self) -> Figure:
        """The matplotlib figure."""
        labels = [curve.label for curve in self.curves if curve.y]
        shapes = dict(zip(dict.fromkeys(mark.label for mark in self.marks), itertools.cycle(SHAPES)))
        entries = len(labels) + len(shapes)
        columns = _legend_columns([*labels, *shapes])
        rows = math.ceil(entries / columns) if entries > 1 else 0
        figure = Figure(figsize=(7.2, 3.6 + _LEGEND_ROW * rows), layout="constrained")
        axes: Axes = figure.add_subplot()
        for curve in self.curves:
            self._line(axes, curve)
        for mark in self.marks:
            axes.plot(mark.x, mark.y, f"{shapes[mark.label]}-", color=mark.colour, linewidth=0.8, markersize=4)
        for label, shape in shapes.items():
            axes.plot([], [], f"{shape}-", color="#555555", linewidth=0.8, markersize=4, label=_shown(label))
        axes.set(title=self.title, xlabel=self.x_label, ylabel=self.y_label)
        self._scale(axes)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if rows:
            figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=_LEGEND_FONT)
        return figure

    def _scale(self, axes: Axes) -> None:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        values = [y for curve in (*self.curves, *self.marks) for y in curve.y if math.isfinite(y)]
        positive = [y for y in values if y > 0]
        if positive and max(positive) > LOG_FROM * min(positive) and min(values) >= 0:
            axes.set_yscale("log")
        elif positive and max(positive) >= 10_000:
            axes.yaxis.set_major_formatter(EngFormatter(sep=""))

    def _line(self, axes: Axes, curve: Curve) -> None:
        if not curve.y:
            return
        x, y = thinned(curve.x, curve.y)
        if self.smooth and len(y) >= 50:
            axes.plot(x, y, color=curve.colour, linewidth=0.7, alpha=0.3)
            axes.plot(x, smoothed(y), color=curve.colour, linewidth=1.6, label=_shown(curve.label))
        else:
            axes.plot(x, y, color=curve.colour, linewidth=1.4, label=_shown(curve.label), marker="." if len(y) < 20 else "")


@dataclass(frozen=True)
class Bars:
    """A figure with one stacked bar per run: how its time divides into kinds of work."""

    name: str
    title: str
    rows: list[tuple[str, dict[str, float]]]
    """(label of a run, kind of work -> its share, 0 to 1)."""

    @property
    def empty(self) -> bool:
        """Whether there is nothing to draw."""
        return not any(shares for _, shares in self.rows)

    @matplotlib.rc_context(PLAIN_TEXT)
    def figure(self) -> Figure:
        """The matplotlib figure."""
        kinds = list(dict.fromkeys(kind for _, shares in self.rows for kind in shares))
        columns = _legend_columns(kinds)
        height = 1.3 + 0.45 * len(self.rows) + _LEGEND_ROW * math.ceil(len(kinds) / columns)
        figure = Figure(figsize=(7.2, height), layout="constrained")
        axes: Axes = figure.add_subplot()
        places = np.arange(len(self.rows))
        left = np.zeros(len(self.rows))
        for kind, colour in zip(kinds, itertools.cycle(COLOURS)):
            widths = np.array([100 * shares.get(kind, 0.0) for _, shares in self.rows])
            axes.barh(places, widths, left=left, color=colour, label=_shown(kind))
            left += widths
        axes.set_yticks(places, [_shown(label) for label, _ in self.rows])
        axes.set(title=self.title, xlabel="% of the time", xlim=(0, 100))
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=_LEGEND_FONT)
        return figure


def _shown(label: str) -> str:
    """A label that leaves room for the figure: of a longer one, its end, which tells directories apart."""
    text = printable(label)
    return text if len(text) <= LABEL_CHARACTERS else f"…{text[1 - LABEL_CHARACTERS :]}"


def _legend_columns(labels: list[str]) -> int:
    """How many entries of a legend stand side by side in the width of a figure."""
    longest = max((len(_shown(label)) for label in labels), default=1)
    return max(1, min(len(labels), 110 // (longest + 8)))  # 110 characters and handles of 8 in 7.2 inches


def thinned(x: list[float], y: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """(x, y) of at most MAX_POINTS points: means of equal buckets, of their finite values; NaN for a bucket without any."""
    xs, ys = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len(ys) <= MAX_POINTS:
        return xs, ys
    starts = np.linspace(0, len(ys), MAX_POINTS, endpoint=False).astype(int)
    finite = np.isfinite(ys)
    sums, counts = np.add.reduceat(np.where(finite, ys, 0.0), starts), np.add.reduceat(finite.astype(int), starts)
    sizes = np.diff(np.append(starts, len(ys)))
    means = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    return np.add.reduceat(xs, starts) / sizes, means


def smoothed(y: np.ndarray) -> np.ndarray:
    """Centred running mean over a fiftieth of the curve (less at its ends) of the finite values; NaN where there is none."""
    radius = max(1, len(y) // 100)
    finite = np.isfinite(y)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, y, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    index = np.arange(len(y))
    low, high = np.maximum(index - radius, 0), np.minimum(index + radius + 1, len(y))
    return np.where(counts[high] > counts[low], (sums[high] - sums[low]) / np.maximum(counts[high] - counts[low], 1), np.nan)


class Picture(Protocol):
    """What can be drawn on a page."""

    @property
    def name(self) -> str: ...
    @property
    def title(self) -> str: ...
    def figure(self) -> Figure: ...


def svg(plot: Picture) -> str:
    """The figure as an SVG element to put into a page: text as text, no date, unique ids, no external references."""
    buffer = io.StringIO()
    no_metadata: dict[str, Any] = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": plot.name}):
        plot.figure().savefig(buffer, format="svg", metadata=no_metadata, transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'(id="|href="#|url\(#)', rf"\1{plot.name}-", text)  # ids of several figures share one page
    return text.replace("<svg ", f'<svg role="img" aria-label="{plot.title}" ', 1)
