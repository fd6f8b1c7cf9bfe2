"""The plot of loss against context length."""

import io
from pathlib import Path

from data.storage import write_atomic


def draw_contexts(path: Path, curves: dict[str, list[tuple[int, float]]], trained_length: int, title: str = "") -> None:
    """Write the plot; the suffix of the file name chooses the format.

    Args:
        curves: name -> [(context in tokens, loss in nats per token)].
        trained_length: tokens; drawn as a vertical line.
    """
    from matplotlib.figure import Figure  # takes most of a second to import
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
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150, format=path.suffix.removeprefix(".") or "png")
    write_atomic(str(path), buffer.getvalue())
