"""Curves of runs as matplotlib figures; no pyplot, so nothing global is touched."""

import io
import re
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

COLOURS = ("#0b6e99", "#d9730d", "#448361", "#9065b0", "#c14c8a", "#cb912f", "#337ea9", "#787774", "#d44c47", "#5a3e85")
MOST_POINTS = 1500
"""Of one curve in a page; more are averaged in buckets, so that a month of training still opens at once."""


@dataclass(frozen=True)
class Curve:
    """One line of a plot."""

    label: str
    colour: str
    x: list[float]
    y: list[float]


@dataclass(frozen=True)
class Plot:
    """One figure: `curves` are drawn as lines, `marks` as dots with a thin line."""

    name: str
    title: str
    x_label: str
    y_label: str
    curves: list[Curve]
    marks: list[Curve]
    smooth: bool = False

    def figure(self) -> Figure:
        """Draw it."""
        figure = Figure(figsize=(7.2, 3.6), layout="constrained")
        axes: Axes = figure.add_subplot()
        for curve in self.curves:
            self._line(axes, curve)
        for curve in self.marks:
            axes.plot(curve.x, curve.y, "o-", color=curve.colour, linewidth=0.8, markersize=4, label=curve.label)
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
            axes.plot(x, smoothed(y), color=curve.colour, linewidth=1.6, label=curve.label)
        else:
            axes.plot(x, y, color=curve.colour, linewidth=1.4, label=curve.label, marker="." if len(y) < 20 else "")


@dataclass(frozen=True)
class Bars:
    """Where the time of each run goes: one stacked bar a run."""

    name: str
    title: str
    rows: list[tuple[str, dict[str, float]]]
    """Label of a run, and the share (0 to 1) of each kind of work."""

    def figure(self) -> Figure:
        """Draw it."""
        figure = Figure(figsize=(7.2, 1.3 + 0.45 * len(self.rows)), layout="constrained")
        axes: Axes = figure.add_subplot()
        kinds = list(dict.fromkeys(kind for _, shares in self.rows for kind in shares))
        labels = [label for label, _ in self.rows]
        left = np.zeros(len(self.rows))
        for kind, colour in zip(kinds, COLOURS * len(kinds), strict=False):
            widths = np.array([100 * shares.get(kind, 0.0) for _, shares in self.rows])
            axes.barh(labels, widths, left=left, color=colour, label=kind)
            left += widths
        axes.set(title=self.title, xlabel="% of the time", xlim=(0, 100))
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(
            frameon=False, fontsize=8, ncols=len(kinds), loc="upper center", bbox_to_anchor=(0.5, -0.4 / len(self.rows))
        )
        return figure


def thinned(x: list[float], y: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """At most MOST_POINTS points: means of equal buckets, of the finite values where a bucket has some."""
    xs, ys = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len(ys) <= MOST_POINTS:
        return xs, ys
    starts = np.linspace(0, len(ys), MOST_POINTS, endpoint=False).astype(int)
    finite = np.isfinite(ys)
    sums, counts = np.add.reduceat(np.where(finite, ys, 0.0), starts), np.add.reduceat(finite.astype(int), starts)
    sizes = np.diff(np.append(starts, len(ys)))
    means = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    return np.add.reduceat(xs, starts) / sizes, means


def smoothed(y: np.ndarray) -> np.ndarray:
    """Running mean over a fiftieth of the curve, centred, shorter at the ends; NaN counts for nothing."""
    reach = max(1, len(y) // 100)
    finite = np.isfinite(y)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, y, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    places = np.arange(len(y))
    low, high = np.maximum(places - reach, 0), np.minimum(places + reach + 1, len(y))
    return np.where(counts[high] > counts[low], (sums[high] - sums[low]) / np.maximum(counts[high] - counts[low], 1), np.nan)


def svg(plot: Plot | Bars) -> str:
    """The figure as an SVG element for a page: real text, no date, ids of its own, nothing fetched from anywhere."""
    written = io.StringIO()
    nothing: dict[str, Any] = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": plot.name}):
        plot.figure().savefig(written, format="svg", metadata=nothing, transparent=True)
    text = written.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'(id="|href="#|url\(#)', rf"\1{plot.name}-", text)  # ids of several figures share one page
    return text.replace("<svg ", f'<svg role="img" aria-label="{plot.title}" ', 1)
