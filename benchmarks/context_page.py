"""The page of benchmarks/context.py: tables, plot, and the posts' order of methods beside ours."""

import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from launch.plots.contexts import draw_contexts

PUBLISHED = {
    "PI": 13.54,
    "RoPE": 23.16,
    "NTK": 39.27,
    "NTK-mixed": 40.12,
    "inverse Leaky w{quarter} k1/16, evaluated with RoPE": 48.32,
    "ReRoPE w{half}": 48.48,
    "Leaky ReRoPE w{half} k16, log n": 48.87,
    "ReRoPE w{half}, log n": 49.07,
}
"""Token accuracy (%) at 8 times the trained length, natural text, 100M GAU trained at 512, windows scaled with the length
(Su 2023, kexue.fm/archives/9706, 9708, 9728); their inverse Leaky has log n, their NTK is the old rule. half, quarter: of the
trained length."""

PLOTTED = (
    "RoPE", "RoPE, log n", "PI", "NTK-mixed", "YaRN", "ReRoPE w{half}", "ReRoPE w{half}, log n",
    "Leaky ReRoPE w{half} k16, log n",
    "inverse Leaky w{quarter} k1/16, evaluated with RoPE",
)  # fmt: skip

Curves = dict[str, list[list[float]]]


def curves(results: list[dict[str, Any]]) -> Curves:
    """Losses by reading: one list a seed, one number a context."""
    found: Curves = {}
    for result in sorted(results, key=lambda result: result["seed"]):
        for name, losses in result["losses"].items():
            found.setdefault(name, []).append(losses)
    return found


def table(found: Curves, contexts: list[int]) -> list[str]:
    """Mean over seeds, and the deviation between seeds at the longest context."""
    lines = ["| evaluated with | " + " | ".join(f"{context:,}" for context in contexts) + " | seeds | deviation at the last |"]
    lines.append("|---" * (len(contexts) + 3) + "|")
    for name, seeds in found.items():
        means = [f"{mean(losses):.3f}" for losses in zip(*seeds, strict=True)]
        spread = f"{stdev(losses[-1] for losses in seeds):.3f}" if len(seeds) > 1 else "-"
        lines.append(f"| {name} | {' | '.join(means)} | {len(seeds)} | {spread} |")
    return lines


def _at(name: str, length: int) -> str:
    return name.format(half=length // 2, quarter=length // 4)


def order(found: Curves, contexts: list[int]) -> list[str]:
    """The published order of methods at 8 times the trained length, worst first, beside the loss seen here."""
    eighth = contexts.index(8 * contexts[0])
    published = {_at(name, contexts[0]): accuracy for name, accuracy in PUBLISHED.items()}
    ours = {name: mean(losses[eighth] for losses in found[name]) for name in published if name in found}
    theirs = [name for name in published if name in ours]
    ranks = sorted(ours, key=lambda name: -ours[name])
    lines = ["| method | the posts' order (accuracy) | order here | loss here |", "|---|---|---|---|"]
    for place, name in enumerate(theirs, 1):
        lines.append(f"| {name} | {place} ({published[name]:.2f} %) | {ranks.index(name) + 1} | {ours[name]:.3f} |")
    return lines


def against(results: list[dict[str, Any]]) -> list[str]:
    """Grouped-query and latent attention of about the same size, same seeds and data."""
    lines = ["| attention | parameters | loss at the trained length | numbers cached a token and layer | tokens a CPU second |"]
    lines.append("|---|---|---|---|---|")
    for name, label, reading in (("rope", "GQA, 1 key head", "RoPE"), ("mla", "MLA", "MLA, RoPE")):
        runs = [result for result in results if result["name"] == name]
        if runs:
            losses = [run["losses"][reading][0] for run in runs]
            spread = f" ± {stdev(losses):.3f}" if len(runs) > 1 else ""
            speed = mean(run["tokens_per_cpu_second"] for run in runs)
            first = f"| {label} | {runs[0]['parameters']:,} | {mean(losses):.3f}{spread} "
            lines.append(f"{first}| {runs[0]['cached_numbers']} | {speed:,.0f} |")
    return lines


def write_page(
    output: Path, page: str, results: list[dict[str, Any]], contexts: list[int], length: int, settings: dict[str, Any]
) -> None:
    """Write a page, its picture and its figures (.md, .png, .json) into a directory."""
    output.mkdir(parents=True, exist_ok=True)
    found = curves(results)
    record = {"settings": settings, "contexts": contexts, "trained_length": length, "results": results}
    (output / f"{page}.json").write_text(json.dumps(record, indent=1) + "\n")
    averaged = {
        name: [(context, mean(losses)) for context, losses in zip(contexts, zip(*found[name], strict=True), strict=True)]
        for name in (_at(name, length) for name in PLOTTED)
        if name in found
    }
    seeds = min(len(found[name]) for name in averaged)
    title = f"read beyond the trained length, {'one seed' if seeds == 1 else f'mean over {seeds} seeds'}"
    draw_contexts(output / f"{page}.png", averaged, length, title)
    size = results[0]["parameters"]
    lines = [
        f"{size:,} parameters, trained on {settings['steps'] * settings['batch'] * length:,} tokens of Python source at "
        f"{length} tokens with AdamW; mean loss (nats) of the last {length // 2} tokens of {settings['rows']} held-out "
        "sequences, at each context.",
        "", *table(found, contexts), "", f"![loss against context]({page}.png)",
    ]  # fmt: skip
    if {"rope", "mla"} <= {result["name"] for result in results}:
        lines += ["", "## The posts' order", "", *order(found, contexts)]
        lines += ["", "## Grouped-query against latent attention", "", *against(results)]
    (output / f"{page}.md").write_text("\n".join(lines) + "\n")
