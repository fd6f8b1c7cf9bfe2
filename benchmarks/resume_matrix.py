"""The whole resume matrix: every layout, engine and optimizer saved, and resumed in every other. Writes a page.

    python -m benchmarks.resume_matrix [--output docs/results/checkpoint_matrix.md]

{tensor {1, 2} x data {1, 2}, context 2 that gathers keys, tensor 2 x context 2 that exchange heads} x {ZeRO 1, 2, 3, fold} x
{Tiger, Lion, AdamW} (fold trains Tiger only), fp32, CPU, gloo.
For each pair every tensor is compared bit for bit, and the next five losses with the unbroken run's.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

from tests.launch.resume import AFTER, SAVED, by_world, cells, largest_difference, read_cells, write_cells
from tests.ranks import run_ranks

OPTIMIZERS = ("tiger", "lion", "adamw")


def matrix(folder: str) -> tuple[dict[str, list[float]], dict[tuple[str, str], list[float]]]:
    """Losses after the checkpoint: of the unbroken runs by cell, of the resumed ones by (reader, writer)."""
    every = [cell for optimizer in OPTIMIZERS for cell in cells(optimizer)]
    unbroken: dict[str, list[float]] = {}
    resumed: dict[tuple[str, str], list[float]] = {}
    for size, chosen in by_world(every).items():
        unbroken |= run_ranks(write_cells, size, folder, chosen, timeout_seconds=1800)[0]
        print(f"saved {len(chosen)} cells of {size} ranks", flush=True)
    for size, chosen in by_world(every).items():
        for reader in chosen:
            resumed |= run_ranks(read_cells, size, folder, [reader], every, timeout_seconds=1800)[0]
            print(f"read {len(resumed)} pairs, last by {reader}", flush=True)
    return unbroken, resumed


def controls(folder: str, unbroken: dict[str, list[float]]) -> dict[str, float]:
    """By optimizer, how far the losses are off when its state is left out."""
    found = {}
    for optimizer in OPTIMIZERS:
        cell = cells(optimizer)[0]
        losses = run_ranks(read_cells, 1, folder, [cell], [cell], True)[0]
        found[optimizer] = largest_difference(losses[str(cell), str(cell)], unbroken[str(cell)])
    return found


def page(
    unbroken: dict[str, list[float]],
    resumed: dict[tuple[str, str], list[float]],
    control: dict[str, float],
    seconds: float,
) -> str:
    """The results as Markdown."""
    lines = [
        "# Resume matrix",
        "",
        "    python -m benchmarks.resume_matrix",
        "",
        f"Saved after {SAVED} steps, compared over the next {AFTER}; a two-layer network in fp32 with grouped-query attention,",
        "tied half-swapped head and normed queries and keys; torch "
        f"{torch.__version__} on the CPU with gloo; {seconds:.0f} s in all.",
        "In every pair all tensors (weights, momentum, second moment) were equal bit for bit after loading.",
        "",
        "| optimizer | pairs | same cell: bitwise | largest difference of a loss, other cells (relative) | state left out |",
        "|---|---|---|---|---|",
    ]
    for optimizer in OPTIMIZERS:
        names = {str(cell) for cell in cells(optimizer)}
        pairs = {key: losses for key, losses in resumed.items() if key[1] in names}
        same = [unbroken[writer] == losses for (reader, writer), losses in pairs.items() if reader == writer]
        other = [largest_difference(losses, unbroken[w]) for (reader, w), losses in pairs.items() if reader != w]
        lines.append(
            f"| {optimizer} | {len(pairs)} | {sum(same)} of {len(same)} | {max(other):.1e} | {control[optimizer]:.1e} |"
        )
    worst = max(resumed, key=lambda key: largest_difference(resumed[key], unbroken[key[1]]))
    lines += ["", f"The worst pair: written by {worst[1]}, read by {worst[0]}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/results/checkpoint_matrix.md"))
    output = parser.parse_args().output
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        unbroken, resumed = matrix(folder)
        control = controls(folder, unbroken)
    text = page(unbroken, resumed, control, time.monotonic() - began)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text)
    print(text)
    broken = [key for key in resumed if key[0] == key[1] and resumed[key] != unbroken[key[1]]]
    off = [key for key in resumed if largest_difference(resumed[key], unbroken[key[1]]) >= 1e-5]
    if broken or off:
        raise SystemExit(f"not bitwise: {broken}; off the curve: {off}")


if __name__ == "__main__":
    main()
