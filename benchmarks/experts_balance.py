"""What keeps the loads of experts even, on the small mixture of launch/configs/quickstart-moe.toml.

    python -m benchmarks.experts_balance [--data runs/quickstart] [--work build/experts_balance] [--seeds 2]

Selection bias (two ways to step it), auxiliary loss and neither, and a dense network whose mlps are as wide as those
that a token of the mixture passes; one process with one thread each. Text and tokenizer are those of `tiglon
quickstart`, made by its commands where they are not there. Finished runs are kept in --work and not repeated. Writes
experts_balance.json, .md and .png to --output.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from benchmarks.muon import execute
from launch.commands.quickstart import quickstart_steps, run_step
from launch.load_config import load_config
from launch.plots.experts import STARVED
from model.sizes import parameter_counts
from trainer.monitoring.records import read_records

STEPS = 600
CONFIG = "launch/configs/quickstart-moe.toml"
LAST_STEPS = 100
"""What the table says of the end is a mean over the records of so many steps: one batch says little of an expert."""

RUNNING = 5
"""Records of a running mean."""


@dataclass(frozen=True)
class Variant:
    """One way to keep loads even."""

    name: str
    overrides: tuple[str, ...]


VARIANTS = (
    Variant("bias, sign, 1e-3", ()),
    Variant("neither", ("model.router_bias=false",)),
    Variant("dense", ("model.feed_forward=swiglu",)),
    Variant("auxiliary loss, 1e-2", ("model.router_bias=false", "model.router_aux_loss_coef=1e-2")),
    Variant("bias, rms, 1e-3", ("model.router_bias_step=rms",)),
)


@dataclass(frozen=True)
class Place:
    """Where the corpus is and where runs are kept."""

    data: Path
    work: Path
    steps: int = STEPS

    def prepare(self) -> None:
        """Text, tokenizer and shards of the quickstart, as its commands make them."""
        for number, step in enumerate(quickstart_steps(self.data)[:3], start=1):
            run_step(step, f"{number}/3")

    def command(self, variant: Variant, seed: int, directory: Path) -> list[str]:
        """`tiglon train` of one run."""
        corpus = self.data / "corpus"
        overrides = (
            f"run.dir={directory}", f"run.seed={seed}", f"data.tokenizer={self.data}/tokenizer", f"data.train={corpus}/train",
            f"data.validation={corpus}/validation", f"train.steps={self.steps}", *variant.overrides, "log.sample_prompt=",
            "log.tensorboard=false", "checkpoint.every_steps=0",
        )  # fmt: skip
        return [sys.executable, "-m", "launch", "train", CONFIG, *overrides]

    def curve(self, variant: Variant, seed: int) -> dict[str, Any]:
        """Losses and loads of a run, which is made unless it was."""
        slug = variant.name.replace(",", "").replace(" ", "-")
        directory = self.work / f"{slug}-{seed}"
        if not (directory / "done").exists():
            execute(self.command(variant, seed, directory))
            (directory / "done").touch()
        curve = read_curve(read_records(directory / "metrics.jsonl"))
        print(f"{variant.name}, seed {seed}: validation loss {curve['validation'][-1][1]:.4f}", flush=True)
        return curve


def read_curve(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of a run's records: losses by step, largest loads by step, and every expert's load at the end; the last two are empty
    without experts."""
    layers: dict[str, list[tuple[int, list[float]]]] = {}
    for record in records:
        if record["kind"] == "experts":
            layers.setdefault(record["name"], []).append((record["step"], record["load"]))
    return {
        "train": [(r["step"], r["loss"]) for r in records if r["kind"] == "train"],
        "validation": [(r["step"], r["loss"]) for r in records if r["kind"] == "evaluate"],
        "largest": largest_loads(layers),
        "end": {name: end_loads(loads) for name, loads in layers.items()},
    }


def largest_loads(layers: dict[str, list[tuple[int, list[float]]]]) -> list[tuple[int, float, float]]:
    """(step, mean over layers, worst layer) of the largest load, over that of even loads."""
    by_step: dict[int, list[float]] = {}
    for loads in layers.values():
        for step, load in loads:
            by_step.setdefault(step, []).append(max(load) * len(load))
    return [(step, statistics.fmean(largest), max(largest)) for step, largest in sorted(by_step.items())]


def end_loads(loads: Sequence[tuple[int, list[float]]]) -> list[float]:
    """Mean load of every expert of a layer in the last LAST_STEPS steps, over that of even loads."""
    last = [load for step, load in loads if step > loads[-1][0] - LAST_STEPS]
    return [round(statistics.fmean(shares) * len(last[0]), 4) for shares in zip(*last, strict=True)]


def measure(place: Place, seeds: int, at_once: int) -> list[dict[str, Any]]:
    """All runs with so many seeds, `at_once` of them at a time."""
    with ThreadPoolExecutor(at_once) as pool:
        futures = {(v.name, seed): pool.submit(place.curve, v, seed) for seed in range(seeds) for v in VARIANTS}
        return [{"name": v.name, "curves": [futures[v.name, seed].result() for seed in range(seeds)]} for v in VARIANTS]


PAGE = """# What keeps the loads of experts even

    python -m benchmarks.experts_balance --seeds {count}

{network}

{steps} updates of {tokens:,} tokens of the quickstart's text with Tiger in bf16, over a schedule of that length; one
process with one thread per run. Runs differ in what their names say and in nothing else. *Bias* moves each expert's bias in the
choice after every update, by the rate times the sign of its distance from the mean load, or times that distance over the RMS of
all experts'. The *auxiliary loss* has the weight 0.01 per token, without a bias. *Dense* is the same network with one mlp per
layer instead, as wide as the three experts that a token passes.

A load is an expert's share of a layer's choices over that of even loads: 1 is even, and {most:g} is the most, where every token
chooses the same experts. The largest load is that of a batch, {per_expert:g} choices per expert: if tokens chose by chance it
were about {chance:.2f}, but eight passages of source code have their favourites. So the table also has the largest load of the
last {last} steps' recorded batches together, in which an expert with less than a tenth of an even load is *starved*.

![largest load and losses](experts_balance.png)

| | {seeds} | mean | training loss | largest load, mean | worst layer | batches together | below 2 from step | starved |
|---|{bars}---|---|---|---|---|---|---|
{rows}

Losses in nats per token: of the validation text by seed and their mean, and of the training batches of the last {last} steps.
Loads are means over the seeds and the last {last} steps, of all layers or of the worst. From the step of the last column but
one, the later one of the seeds', the worst layer's running mean over {running} records stays below 2; starved experts by seed.

## What is seen

{seen}
"""

SEEN = """
- **Left alone the router collapses**, in the first ten updates: in the last layer two experts get every token to the end of the
  run, and many experts of the last two layers learn next to nothing.
- **The bias brings every layer to even loads** without a loss, with either step. It takes its time: 1e-3 per update against
  scores between 0 and 1 is hundreds of updates until an expert that all prefer is passed by. No expert is starved at the end.
  What is left in a batch is what its passages prefer: over ten batches together the largest load is near 1.
- **The auxiliary loss is quicker** in so short a run, since it moves the scores themselves, and about as even in the end.
- **The text's loss does not depend on it.** All mixtures, the collapsed one among them, and the dense network end about as far
  from one another as two seeds of one of them do (3.61 and 3.60 with the bias). A million tokens are too few for the parameters
  that a mixture has more: no gain over a dense network is shown here, and no cost of balancing either.

Not seen here: long runs, many experts, other rates and weights than those of the table, loads of experts that are split over
ranks. DeepSeek-V3's 1e-3 is meant for runs of many thousand updates.
"""


def page(results: Sequence[dict[str, Any]]) -> str:
    """The page of all results."""
    config = load_config(CONFIG)
    tokens, E, K = config.train.batch_tokens, config.model.n_routed_experts, config.model.num_experts_per_tok
    seeds = len(results[0]["curves"])
    return PAGE.format(
        network=network(), count=seeds, steps=f"{results[0]['curves'][0]['train'][-1][0]:,}", tokens=tokens, most=E / K,
        per_expert=tokens * K / E, chance=largest_by_chance(E, tokens * K / E), last=LAST_STEPS, running=RUNNING,
        seeds=" | ".join(f"seed {seed}" for seed in range(seeds)), bars="---|" * seeds, seen=SEEN.strip(),
        rows="\n".join(f"| {' | '.join(cells(result))} |" for result in results),
    )  # fmt: skip


def network() -> str:
    """A sentence of its sizes."""
    model = load_config(CONFIG).model
    whole = parameter_counts(model)["total"]
    layers, K, E = len(model.layers_with_experts), model.num_experts_per_tok, model.n_routed_experts
    active = whole - layers * (E - K) * 3 * model.hidden_size * model.moe_intermediate_size
    return (
        f"The mixture of `{CONFIG}`: {whole / 1e6:.1f} million parameters, {active / 1e6:.1f} million of which act on a token; "
        f"{layers} of {model.num_hidden_layers} layers have {E} experts of {model.moe_intermediate_size} hidden units, of "
        f"which a token passes {K}, and a shared one."
    )


def largest_by_chance(experts: int, mean: float) -> float:
    """About the largest of so many even loads, over their mean, where each counts independent choices: the expected largest of
    normal numbers (Blom 1958)."""
    return 1 + NormalDist().inv_cdf((experts - 0.375) / (experts + 0.25)) / math.sqrt(mean)


def cells(result: dict[str, Any]) -> list[str]:
    """The row of a variant."""
    curves = result["curves"]
    final = [curve["validation"][-1][1] for curve in curves]
    row = [result["name"], *(f"{loss:.4f}" for loss in final), f"{statistics.fmean(final):.4f}"]
    row.append(f"{statistics.fmean(over_end(curve['train'], 1) for curve in curves):.4f}")
    if not curves[0]["largest"]:
        return [*row, *["-"] * 5]
    ends = [statistics.fmean(over_end(curve["largest"], column) for curve in curves) for column in (1, 2)]
    even = [even_from(curve["largest"]) for curve in curves]
    loads = [[load for layer in curve["end"].values() for load in layer] for curve in curves]
    starved = [str(sum(load < STARVED for load in each)) for each in loads]
    ends.append(statistics.fmean(max(each) for each in loads))
    row += [*(f"{end:.2f}" for end in ends), "never" if None in even else f"{max(step for step in even if step)}"]
    return [*row, f"{' and '.join(starved)} of {len(loads[0])}"]


def over_end(curve: Sequence[Sequence[float]], column: int) -> float:
    """The mean over the last LAST_STEPS steps."""
    return statistics.fmean(row[column] for row in curve if row[0] > curve[-1][0] - LAST_STEPS)


def even_from(largest: Sequence[Sequence[float]]) -> int | None:
    """The first recorded step from which on the worst layer's mean over RUNNING records stays below 2; None if it does not."""
    first = None
    for index, (step, *_) in enumerate(largest):
        recent = [worst for _, _, worst in largest[max(0, index + 1 - RUNNING) : index + 1]]
        first = None if statistics.fmean(recent) >= 2 else first or int(step)
    return first


def plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Largest loads and losses over steps, a colour per variant and a line per seed; below, every expert in the first seed."""
    figure = Figure(figsize=(11, 9), layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=(4, 1))
    panels = figure.add_subfigure(grid[0]).subplots(2, 2)
    dense = next(result["curves"] for result in results if not result["curves"][0]["largest"])
    for color, result in enumerate(results):
        for index, (curve, base) in enumerate(zip(result["curves"], dense, strict=True)):
            steps, mean, worst = zip(*curve["largest"], strict=True) if curve["largest"] else ((), (), ())
            label, style = None if index else result["name"], {"linestyle": "--" if index else "-", "linewidth": 1.1}
            drawn = (
                (steps, worst),
                (steps, mean),
                less(curve["train"], base["train"]),
                less(curve["validation"], base["validation"]),
            )
            for axes, (x, y) in zip(panels.flat, drawn, strict=True):
                axes.plot(x, y, f"C{color}", label=label, **style)
    for axes, title in zip(panels.flat, TITLES, strict=True):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
    for loads, losses in zip(*panels, strict=True):
        loads.axhline(1, color="#555555", linewidth=0.6)
        loads.set(ylabel="over that of even loads", ylim=(0, None))
        losses.set(ylabel="nats per token")
    panels[1, 1].legend(fontsize="small")
    ends = [(result["name"], result["curves"][0]["end"]) for result in results if result["curves"][0]["end"]]
    draw_ends(figure.add_subfigure(grid[1]), ends)
    figure.savefig(path, dpi=110)


TITLES = (
    "largest load of a batch, worst layer",
    "largest load of a batch, mean of layers",
    f"training loss less that of dense, mean of {RUNNING} records",
    "validation loss less that of dense",
)


def less(curve: Sequence[Sequence[float]], base: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """(steps, differences of losses of the same batches); of many records their running means."""
    steps = [row[0] for row in curve]
    apart = [loss - other for (_, loss), (_, other) in zip(curve, base, strict=True)]
    width = RUNNING if len(apart) > 2 * RUNNING else 1
    means = [statistics.fmean(apart[index + 1 - width : index + 1]) for index in range(width - 1, len(apart))]
    return steps[width - 1 :], means


def draw_ends(figure: SubFigure, ends: Sequence[tuple[str, dict[str, list[float]]]]) -> None:
    """Every expert of every layer in the last LAST_STEPS steps, side by side by variant."""
    places = figure.subplots(1, len(ends), sharey=True)
    for axes, (name, layers) in zip(places, ends, strict=True):
        loads = np.maximum(list(layers.values()), 1 / 8)
        shown = axes.imshow(loads, aspect="auto", interpolation="nearest", cmap="RdBu_r", norm=LogNorm(1 / 8, 8))
        axes.set_title(name, fontsize=9)
        axes.set_xlabel(f"expert, mean of the last {LAST_STEPS} steps", fontsize=7)
        axes.set_yticks(range(len(layers)), layers, fontsize=7)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(shown, ax=places, ticks=(1 / 8, 1 / 2, 1, 2, 8), format=StrMethodFormatter("{x:g}")).minorticks_off()


def main() -> None:
    """Train what has not been trained yet, and write the page."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--data", type=Path, default=Path("runs/quickstart"))
    arguments.add_argument("--work", type=Path, default=Path("build/experts_balance"))
    arguments.add_argument("--seeds", type=int, default=2)
    arguments.add_argument("--at-once", type=int, default=2, help="runs at a time, of one thread each")
    arguments.add_argument("--output", type=Path, default=Path("docs/results"))
    given = arguments.parse_args()
    place = Place(given.data.resolve(), given.work.resolve())
    place.prepare()
    results = measure(place, given.seeds, given.at_once)
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / "experts_balance.json").write_text(json.dumps(results) + "\n")
    (given.output / "experts_balance.md").write_text(page(results))
    plot(results, given.output / "experts_balance.png")


if __name__ == "__main__":
    main()
