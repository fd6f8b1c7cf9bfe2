"""The plot of a mixture: the share of samples from each corpus over the batches of a run."""

import io

import numpy as np

from data.storage import write_atomic


def draw_mixture(path: str, names: list[str], draws: np.ndarray, batches: int) -> None:
    """Write a stacked plot of shares.

    Args:
        path: file to write, .png or .svg.
        names: of the corpora.
        draws: samples drawn, [intervals, corpora]; the intervals divide the run into equal parts.
        batches: of the whole run.

    Raises:
        ValueError: another suffix.
    """
    if not path.endswith((".png", ".svg")):
        raise ValueError(f"--picture {path}: name a .png or .svg file")
    from matplotlib.figure import Figure  # takes most of a second to import

    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.add_subplot()
    edges = np.linspace(0, batches, len(draws) + 1)
    shares = draws / np.maximum(draws.sum(axis=1, keepdims=True), 1)
    base = np.zeros(len(draws))
    for name, share in zip(names, shares.T):
        axes.stairs(base + share, edges, baseline=base, fill=True, label=f"{name} ({share.mean():.1%})")
        base = base + share
    axes.set(xlabel="batch", ylabel="share of samples", xlim=(0, batches), ylim=(0, 1))
    axes.legend(loc="lower right", fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150, format=path[-3:])
    write_atomic(path, buffer.getvalue())
