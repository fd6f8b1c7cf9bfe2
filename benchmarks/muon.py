"""Muon, Muon under fold, Tiger, Lion and AdamW on the quickstart: loss per token and per second.

    tiglon quickstart
    python -m benchmarks.muon [--data runs/quickstart] [--work build/muon] [--output docs/results]
    python -m benchmarks.muon --seconds        # on a computer that does nothing else

Each optimizer gets the rate that is best for seed 0 among four, each twice the one before, then runs with seeds 1 and 2.
Finished runs are kept in --work and not repeated. `--seconds` times the optimizers in turns, each on its own for a few steps,
and takes the least of the rounds. Writes muon.json, muon.md and muon.png.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from trainer.monitoring.records import read_records

SEEDS = (0, 1, 2)
ROUNDS, TIMED_STEPS = 5, 30
OTHERS = "optimizer.muon.others"


@dataclass(frozen=True)
class Contestant:
    """An optimizer, with what is set beside its rate."""

    name: str
    overrides: tuple[str, ...]
    rate_keys: tuple[str, ...]
    """The keys that get the rate."""
    rates: tuple[float, ...]


CONTESTANTS = (
    Contestant(
        "Muon, AdamW for the rest", ("optimizer.name=muon",),
        ("optimizer.muon.learning_rate", "optimizer.adamw.learning_rate"), (1e-3, 2e-3, 4e-3, 8e-3),
    ),
    Contestant(
        "Muon under fold, Tiger for the rest",
        ("optimizer.name=muon", f"{OTHERS}=tiger", "optimizer.muon.nesterov=false", "parallel.engine=fold"),
        ("optimizer.muon.learning_rate",), (1e-3, 2e-3, 4e-3, 8e-3),
    ),
    Contestant("Tiger", (), ("optimizer.tiger.learning_rate",), (5e-3, 1e-2, 2e-2, 4e-2)),
    Contestant(
        "Lion", ("optimizer.name=lion", "optimizer.lion.betas=[0.9,0.95]"),
        ("optimizer.lion.learning_rate",), (1.5e-4, 3e-4, 6e-4, 1.2e-3),
    ),
    Contestant("AdamW", ("optimizer.name=adamw",), ("optimizer.adamw.learning_rate",), (1e-3, 2e-3, 4e-3, 8e-3)),
)  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where the corpus is and where runs are kept."""

    data: Path
    work: Path
    ranks: int

    def command(self, contestant: Contestant, rate: float, directory: Path, *more: str) -> list[str]:
        """`tiglon train` of one run."""
        corpus = self.data / "corpus"
        overrides = (
            f"run.dir={directory}", f"data.tokenizer={self.data}/tokenizer", f"data.train={corpus}/train",
            f"data.validation={corpus}/validation", *contestant.overrides, *(f"{key}={rate}" for key in contestant.rate_keys),
            "log.sample_prompt=", "log.tensorboard=false", *more,
        )  # fmt: skip
        ranks = ("--nproc", str(self.ranks))
        return [sys.executable, "-m", "launch", "train", "launch/configs/quickstart.toml", *ranks, *overrides]

    def curve(self, contestant: Contestant, rate: float, seed: int) -> dict[str, Any]:
        """Losses of a run, which is made unless it was: training and validation, by step."""
        slug = contestant.name.replace(",", "").replace(" ", "-").lower()
        directory = self.work / f"{slug}-{rate:g}-{seed}"
        if not (directory / "done").exists():
            execute(self.command(contestant, rate, directory, f"run.seed={seed}", "checkpoint.every_steps=0"))
            (directory / "done").touch()
        records = [*read_records(directory / "metrics.jsonl")]
        return {
            "train": [(r["step"], r["loss"]) for r in records if r["kind"] == "train"],
            "validation": [(r["step"], r["loss"]) for r in records if r["kind"] == "evaluate"],
        }

    def seconds(self, contestant: Contestant, rate: float, index: int) -> float:
        """Median seconds of a step."""
        directory = self.work / f"timed-{index}"
        more = (f"train.steps={TIMED_STEPS}", "log.every_steps=1", "checkpoint.resume=never", "data.validation=")
        execute(self.command(contestant, rate, directory, *more))
        records = [r for r in read_records(directory / "metrics.jsonl") if r["kind"] == "train"]
        return statistics.median(r["step_seconds"] for r in records[5:])


def execute(command: list[str]) -> None:
    """Run a command with one thread.

    Raises:
        RuntimeError: it failed; what it said.
    """
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: status {done.returncode}\n{done.stdout}{done.stderr}")


def final(curve: dict[str, Any]) -> float:
    """Validation loss at the end; a run that diverged counts as infinite."""
    loss = curve["validation"][-1][1]
    return loss if loss == loss else float("inf")


def measure(place: Place) -> list[dict[str, Any]]:
    """The sweep of every optimizer, and its curves at the best rate."""
    found = []
    for contestant in CONTESTANTS:
        sweep = {}
        for rate in contestant.rates:
            sweep[rate] = final(place.curve(contestant, rate, SEEDS[0]))
            print(f"{contestant.name}, rate {rate:g}: {sweep[rate]:.4f}", flush=True)
        best = min(sweep, key=sweep.__getitem__)
        curves = [place.curve(contestant, best, seed) for seed in SEEDS]
        print(f"{contestant.name} at {best:g}: {[round(final(curve), 4) for curve in curves]}", flush=True)
        found.append({"name": contestant.name, "sweep": [[*pair] for pair in sweep.items()], "best": best, "curves": curves})
    return found


def timed(place: Place, results: Sequence[dict[str, Any]]) -> None:
    """Add the seconds of a step to each result."""
    seconds: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        for index, contestant in enumerate(CONTESTANTS):
            best = results[index]["best"]
            seconds.setdefault(contestant.name, []).append(place.seconds(contestant, best, index))
    for result in results:
        result["seconds"] = min(seconds[result["name"]])
        print(f"{result['name']}: {result['seconds']:.4f} s per step", flush=True)


PAGE = """# Muon on the quickstart

    tiglon quickstart
    python -m benchmarks.muon
    python -m benchmarks.muon --seconds

The quickstart's network (4.26 million parameters), text and schedule, 400 updates of 2,048 tokens in bf16. Each optimizer has
the rate that is best for seed 0 among four, each twice the one before; everything else is its default, Tiger's and Lion's betas
those of a short run (0.9; 0.9, 0.95). Validation loss in nats per token.

![Validation loss per token and per second](muon.png)

| optimizer | rate | {seeds} | mean |{seconds_title}
|---|---|{bars}---|{seconds_bar}
{rows}

Rates tried with seed 0:

| optimizer | {columns} |
|---|{column_bars}
{sweeps}
"""


def page(results: Sequence[dict[str, Any]]) -> str:
    """The page of all results."""
    timed_too = all("seconds" in result for result in results)
    rows, sweeps = [], []
    for result in results:
        losses = [final(curve) for curve in result["curves"]]
        cells = [result["name"], f"{result['best']:g}", *(f"{loss:.4f}" for loss in losses), f"{statistics.mean(losses):.4f}"]
        rows.append(" | ".join([*cells, *([f"{result['seconds']:.3f}"] if timed_too else [])]))
        sweeps.append(" | ".join([result["name"], *(f"{rate:g}: {loss:.4f}" for rate, loss in result["sweep"])]))
    most = max(len(result["sweep"]) for result in results)
    return PAGE.format(
        seeds=" | ".join(f"seed {seed}" for seed in SEEDS), bars="---|" * len(SEEDS),
        seconds_title=" seconds per update |" if timed_too else "", seconds_bar="---|" if timed_too else "",
        rows="\n".join(f"| {row} |" for row in rows), sweeps="\n".join(f"| {row} |" for row in sweeps),
        columns=" | ".join(["rate: loss"] * most), column_bars="---|" * most,
    )  # fmt: skip


def plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Validation loss of the seeds over tokens and, where they are known, over seconds."""
    timed_too = all("seconds" in result for result in results)
    figure = Figure(figsize=(11 if timed_too else 6, 4), layout="constrained")
    panels = figure.subplots(1, 2 if timed_too else 1, sharey=True, squeeze=False)[0]
    for color, result in enumerate(results):
        for index, curve in enumerate(result["curves"]):
            steps, losses = zip(*curve["validation"], strict=True)
            label = result["name"] if not index else None
            panels[0].plot([step * 2048 / 1e3 for step in steps], losses, f"C{color}", label=label, marker=".")
            if timed_too:
                panels[1].plot([step * result["seconds"] for step in steps], losses, f"C{color}", marker=".")
    panels[0].set(xlabel="thousand tokens", ylabel="validation loss, nats per token")
    if timed_too:
        panels[1].set(xlabel="seconds of training on two CPU cores")
    panels[0].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Train what has not been trained yet, and write the page."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--data", type=Path, default=Path("runs/quickstart"))
    arguments.add_argument("--work", type=Path, default=Path("build/muon"))
    arguments.add_argument("--ranks", type=int, default=2)
    arguments.add_argument("--seconds", action="store_true", help="time the optimizers too")
    arguments.add_argument("--output", type=Path, default=Path("docs/results"))
    given = arguments.parse_args()
    place = Place(given.data.resolve(), given.work.resolve(), given.ranks)
    results = measure(place)
    if given.seconds:
        timed(place, results)
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / "muon.json").write_text(json.dumps(results, indent=1) + "\n")
    (given.output / "muon.md").write_text(page(results))
    plot(results, given.output / "muon.png")


if __name__ == "__main__":
    main()
