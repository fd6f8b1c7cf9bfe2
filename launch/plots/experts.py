"""The loads of a run's experts: the ends of each layer over the steps, and every expert at the last record."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, StrMethodFormatter

from launch.plots.figures import LABEL_CHARACTERS, PLAIN_TEXT, thinned
from trainer.printable import printable

STARVED = 0.1
"""Of an even load: an expert with less learns from too few tokens to be worth its memory."""
_LEGEND_LAYERS = 8
"""More layers than this are told apart by a bar of colours."""


@dataclass(frozen=True)
class ExpertLoads:
    """A figure. Every load is over that of even loads: 1 is even, 0 nothing."""

    layers: list[str]
    steps: list[int]
    ends_SL: tuple[np.ndarray, np.ndarray]
    """Largest and smallest load of each layer at each step."""
    last_LE: np.ndarray
    """Of every expert at the last step."""
    name: str = "experts"
    title: str = "Loads of experts"

    @classmethod
    def of_records(cls, records: Sequence[dict[str, Any]]) -> "ExpertLoads | None":
        """From records of kind "experts" in the order of their steps; None without a step that has all layers."""
        layers = list(dict.fromkeys(record["name"] for record in records))
        by_step: dict[int, dict[str, dict[str, Any]]] = {}
        for record in records:
            by_step.setdefault(record["step"], {})[record["name"]] = record
        rows = {step: [found[layer] for layer in layers] for step, found in by_step.items() if len(found) == len(layers)}
        last = rows[max(rows)] if rows else []
        if len({len(record["load"]) for record in last}) != 1:
            return None
        largest, smallest = (
            np.array([[record[end] for record in row] for row in rows.values()]) for end in ("largest", "smallest")
        )
        load_LE = np.array([record["load"] for record in last])
        shown = [printable(layer)[:LABEL_CHARACTERS] for layer in layers]
        return cls(shown, list(rows), (largest, smallest), load_LE * load_LE.shape[1])

    @property
    def sentence(self) -> str:
        """What is seen at the last step."""
        high, low = (np.unravel_index(end(self.last_LE), self.last_LE.shape) for end in (np.argmax, np.argmin))
        starved = int((self.last_LE < STARVED).sum())
        some = (
            f"{starved:,} of {self.last_LE.size:,} get less than a tenth of one" if starved else "none gets less than a tenth"
        )
        most = f"expert {high[1]} of {self.layers[high[0]]} gets {self.last_LE[high]:.2f} times an even load, the most"
        least = f"expert {low[1]} of {self.layers[low[0]]} {self.last_LE[low]:.2f} times, the least"
        return f"At step {self.steps[-1]:,} {most}, and {least}; {some}."

    @matplotlib.rc_context(PLAIN_TEXT)
    def figure(self) -> Figure:
        """The matplotlib figure."""
        figure = Figure(figsize=(10, 3.8), layout="constrained")
        lines, heat = figure.subplots(1, 2)
        figure.suptitle(self.title, fontsize=11)
        self._draw_ends(figure, lines)
        self._draw_last(figure, heat)
        return figure

    def _draw_ends(self, figure: Figure, axes: Axes) -> None:
        colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(self.layers)))
        few = len(self.layers) <= _LEGEND_LAYERS
        for index, (layer, colour) in enumerate(zip(self.layers, colours, strict=True)):
            for ends, style in zip(self.ends_SL, ("-", ":"), strict=True):
                x, y = thinned([float(step) for step in self.steps], [float(load) for load in ends[:, index]])
                label = layer if few and style == "-" else None
                axes.plot(x, y, style, color=colour, linewidth=1.1, label=label, marker="." if len(y) < 20 else "")
        axes.axhline(1.0, color="#555555", linewidth=0.6)
        axes.set(title="largest (line) and smallest (dots) by step", xlabel="step", ylabel="load over that of even loads")
        axes.title.set_fontsize(9)
        axes.set_ylim(bottom=0.0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        if few:
            axes.legend(fontsize=7, frameon=False)
        else:
            scale = ScalarMappable(Normalize(0, len(self.layers) - 1), "viridis")
            figure.colorbar(scale, ax=axes, label="layer with experts", ticks=MaxNLocator(integer=True))

    def _draw_last(self, figure: Figure, axes: Axes) -> None:
        end = max(2.0, 2.0 ** math.ceil(math.log2(max(float(self.last_LE.max()), 1.0))))
        shown = axes.imshow(
            np.maximum(self.last_LE, 1 / end), aspect="auto", interpolation="nearest", cmap="RdBu_r", norm=LogNorm(1 / end, end)
        )
        axes.set(title=f"every expert at step {self.steps[-1]:,}", xlabel="expert")
        axes.title.set_fontsize(9)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        places = np.unique(np.linspace(0, len(self.layers) - 1, min(len(self.layers), 12)).round().astype(int))
        axes.set_yticks(places, [self.layers[place] for place in places], fontsize=7)
        ticks = [2.0**power for power in range(-round(math.log2(end)), round(math.log2(end)) + 1)]
        bar = figure.colorbar(
            shown, ax=axes, ticks=ticks, format=StrMethodFormatter("{x:g}"), label="load over that of even loads"
        )
        bar.minorticks_off()
