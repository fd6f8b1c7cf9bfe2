"""The page and the plot of every measured shape: docs/results/step-*.json -> step.md, step.png."""

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

HEAD = """# Training speed beside the peers

Each section is one run of `benchmarks/step.py`: the same network, tokens and bfloat16 in every trainer; each process trains
some steps in turn while the others sleep; the number is the median over the rounds. *Of best peer* is against the fastest peer
in that run. MFU is of the fastest bfloat16 matrix product measured in the same run, with the causal half of attention counted
and with all of it. *First minute* is what a trainer has trained one minute after its process was started with an empty
compile cache. Rows with Tiger have another optimizer than the peers and are left out of the ratio, unless no row with AdamW
ran, which is then said beside it.

Where the load average is above the number of cores, tokens/s, starts and the first minute depend on who else was at work in
that moment (see the spread of the rounds): believe the ratio of tokens per second of processor time.

![tokens/s](step.png)
"""


def section(result: dict[str, Any]) -> str:
    """One run as Markdown."""
    best = max((row["tokens_per_second"] for row in result["rows"] if row["peer"] and "reason" not in row), default=0.0)
    ratios = [_ratio(result.get(key)) for key in ("ratio_to_best_peer", "ratio_in_cpu_time", "ratio_in_first_minute")]
    note = f" ({result['ratio_note']})" if "ratio_note" in result else ""
    lines = [
        f"## {result['shape']}: {result['parameters'] / 1e6:.1f}M parameters, length {result['length']}, "
        f"{result['batch']} sequences a step, {result['where']}",
        "",
        f"`{result['command']}`: torch {result['torch']}, matrix product "
        f"{result['ceiling_flops']['measured'] / 1e12:.2f} TFLOP/s, load average {result['load']:.1f}. "
        f"**Ratio to the best peer{note}: {ratios[0]}** in tokens/s, {ratios[1]} in tokens per second of processor "
        f"time, {ratios[2]} in the first minute.",
        "",
        "| trainer | optimizer, state | tokens/s (lowest - highest round) | of best peer | tokens/CPU s "
        "| MFU causal / full | peak memory, GB | start, s | first step, s | tokens in the first minute | loss, first / last |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        what = f"| {called(row)} | {row['optimizer']}, {row['state']} |"
        if "reason" in row:
            lines.append(f"{what} does not run: {row['reason']} | | | | | | | | |")
            continue
        lines.append(
            f"{what} {row['tokens_per_second']:,.0f} ({min(row['rounds']):,.0f} - {max(row['rounds']):,.0f}) | "
            f"{row['tokens_per_second'] / best if best else 0:.2f} | {row['tokens_per_cpu_second']:,.0f} | "
            f"{row['mfu_causal_of_measured']:.1%} / {row['mfu_full_of_measured']:.1%} | {row['memory_bytes'] / 1e9:.2f} | "
            f"{row['startup_seconds']:.1f} | {row['first_step_seconds']:.1f} | {row['tokens_in_first_minute']:,.0f} | "
            f"{row['first_loss']:.2f} / {row['last_loss']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def called(row: dict[str, Any]) -> str:
    """A trainer's name, and whether it recomputes activations."""
    again = row.get("recompute", "none")
    return row["name"] if again == "none" else f"{row['name']}, {again} recomputation"


def _ratio(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f}"


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """A bar a trainer, a panel a run; the whiskers are the lowest and the highest round."""
    figure, axes = plt.subplots(1, len(results), figsize=(6 * len(results), 4.5), squeeze=False)
    for panel, result in zip(axes[0], results, strict=True):
        rows = [row for row in result["rows"] if "reason" not in row][::-1]
        speeds = [row["tokens_per_second"] for row in rows]
        spread = [[row["tokens_per_second"] - min(row["rounds"]) for row in rows]]
        spread.append([max(row["rounds"]) - row["tokens_per_second"] for row in rows])
        colours = ["tab:gray" if row["peer"] else "tab:orange" for row in rows]
        panel.barh([row["name"] for row in rows], speeds, xerr=spread, color=colours, capsize=2)
        panel.set(xlabel="tokens/s", title=f"{result['shape']}, length {result['length']}, {result['where']}")
        panel.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write_page(folder: Path) -> None:
    """Read every result in the folder and write step.md and step.png beside them."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("step-*.json"))]
    results.sort(key=lambda result: (result["device"], result["parameters"], result["length"]))
    if results:
        (folder / "step.md").write_text("\n".join([HEAD, *map(section, results)]))
        draw(results, folder / "step.png")
