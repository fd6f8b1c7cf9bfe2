"""A picture of a mixture: which corpus provides how much of each hundredth of a run."""

import io

import numpy as np

from data.storage import write_whole


def draw_mixture(path: str, names: list[str], draws: np.ndarray, steps: int) -> None:
    """Write stacked shares over steps.

    Args:
        path: file to write, .png or .svg.
        draws: samples [stretches, corpora].
    Raises ValueError for a file name of another kind.
    """
    if not path.endswith((".png", ".svg")):
        raise ValueError(f"--picture {path}: name a .png or .svg file")
    from matplotlib.figure import Figure  # most of a second to import: only where it is wanted

    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.add_subplot()
    edges = np.linspace(0, steps, len(draws) + 1)
    shares = draws / np.maximum(draws.sum(axis=1, keepdims=True), 1)
    base = np.zeros(len(draws))
    for name, share in zip(names, shares.T):
        axes.stairs(base + share, edges, baseline=base, fill=True, label=f"{name} ({share.mean():.1%})")
        base = base + share
    axes.set(xlabel="step", ylabel="share of samples", xlim=(0, steps), ylim=(0, 1))
    axes.legend(loc="lower right", fontsize="small")
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=150, format=path[-3:])
    write_whole(path, drawn.getvalue())
