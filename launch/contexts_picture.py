"""The plot of loss against context length."""

import io
from pathlib import Path

from data.storage import write_whole


def draw_contexts(path: Path, curves: dict[str, list[tuple[int, float]]], trained_length: int, title: str = "") -> None:
    """Write a plot of curves {name: [(context in tokens, loss in nats)]}; the file name's suffix chooses the format."""
    from matplotlib.figure import Figure  # most of a second to import: only where it is wanted
    from matplotlib.ticker import ScalarFormatter

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        axes.plot([context for context, _ in curve], [loss for _, loss in curve], marker="o", markersize=4, label=name)
    axes.axvline(trained_length, color="grey", linestyle=":", linewidth=1, label=f"trained length {trained_length}")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlabel("context (tokens)")
    axes.set_ylabel("loss of the same tokens (nats per token)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=150, format=path.suffix.removeprefix(".") or "png")
    write_whole(str(path), drawn.getvalue())
