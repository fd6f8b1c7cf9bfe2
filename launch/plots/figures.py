"""Curves of runs as matplotlib figures, without pyplot and its global state."""

import io
import re
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from trainer.printable import printable

COLOURS = ("#0b6e99", "#d9730d", "#448361", "#9065b0", "#c14c8a", "#cb912f", "#337ea9", "#787774", "#d44c47", "#5a3e85")
PLAIN_TEXT: Any = {"text.parse_math": False}
"""For matplotlib: a $ in the name of a run or a corpus is no formula."""
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
    """A figure with `curves` as lines and `marks` as dots joined by a thin line."""

    name: str
    title: str
    x_label: str
    y_label: str
    curves: list[Curve]
    marks: list[Curve]
    smooth: bool = False

    @matplotlib.rc_context(PLAIN_TEXT)
    def figure(self) -> Figure:
        """The matplotlib figure."""
        figure = Figure(figsize=(7.2, 3.6), layout="constrained")
        axes: Axes = figure.add_subplot()
        for curve in self.curves:
            self._line(axes, curve)
        for curve in self.marks:
            axes.plot(curve.x, curve.y, "o-", color=curve.colour, linewidth=0.8, markersize=4, label=printable(curve.label))
        axes.set(title=self.title, xlabel=self.x_label, ylabel=self.y_label)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if len(self.curves) + len(self.marks) > 1:
            axes.legend(frameon=False, fontsize=8)
        return figure

    def _line(self, axes: Axes, curve: Curve) -> None:
        x, y = thinned(curve.x, curve.y)
        if self.smooth and len(y) >= 50:
            axes.plot(x, y, color=curve.colour, linewidth=0.7, alpha=0.3)
            axes.plot(x, smoothed(y), color=curve.colour, linewidth=1.6, label=printable(curve.label))
        else:
            axes.plot(x, y, color=curve.colour, linewidth=1.4, label=printable(curve.label), marker="." if len(y) < 20 else "")


@dataclass(frozen=True)
class Bars:
    """A figure with one stacked bar per run: how its time divides into kinds of work."""

    name: str
    title: str
    rows: list[tuple[str, dict[str, float]]]
    """(label of a run, kind of work -> its share, 0 to 1)."""

    @matplotlib.rc_context(PLAIN_TEXT)
    def figure(self) -> Figure:
        """The matplotlib figure."""
        figure = Figure(figsize=(7.2, 1.3 + 0.45 * len(self.rows)), layout="constrained")
        axes: Axes = figure.add_subplot()
        kinds = list(dict.fromkeys(kind for _, shares in self.rows for kind in shares))
        labels = [printable(label) for label, _ in self.rows]
        left = np.zeros(len(self.rows))
        for kind, colour in zip(kinds, COLOURS * len(kinds), strict=False):
            widths = np.array([100 * shares.get(kind, 0.0) for _, shares in self.rows])
            axes.barh(labels, widths, left=left, color=colour, label=printable(kind))
            left += widths
        axes.set(title=self.title, xlabel="% of the time", xlim=(0, 100))
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(
            frameon=False, fontsize=8, ncols=len(kinds), loc="upper center", bbox_to_anchor=(0.5, -0.4 / len(self.rows))
        )
        return figure


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


def svg(plot: Plot | Bars) -> str:
    """The figure as an SVG element to put into a page: text as text, no date, unique ids, no external references."""
    buffer = io.StringIO()
    no_metadata: dict[str, Any] = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": plot.name}):
        plot.figure().savefig(buffer, format="svg", metadata=no_metadata, transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'(id="|href="#|url\(#)', rf"\1{plot.name}-", text)  # ids of several figures share one page
    return text.replace("<svg ", f'<svg role="img" aria-label="{plot.title}" ', 1)
