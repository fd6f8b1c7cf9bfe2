"""bfloat16 weights and momentum, rounded stochastically or to nearest, against float32 masters.

    python -m benchmarks.rounding [--steps 300] [--seeds 3] [--output docs/results]

A small decoder learns the bytes of Python's own standard library under Tiger: ZeRO-1 with a bf16 network and fp32
masters, and the fold engine with nothing but bf16, rounded in either way. Writes stochastic_rounding.md and .png.
"""

import argparse
import random
import sysconfig
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from launch.config import RunConfig
from launch.load_config import build_config
from launch.network import build_network
from model.initialization import rms_floors
from model.parallel.mesh import Mesh, make_mesh
from tests.ranks import run_ranks
from trainer.engines.fold import Fold
from trainer.engines.zero import Zero
from trainer.schedule import multiplier

LENGTH, ROWS, TAIL = 128, 8, 30
BASE: dict[str, Any] = {
    "model": {
        "vocab_size": 256, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3, "num_attention_heads": 4,
    },
    "optimizer": {"tiger": {"learning_rate": 2e-3}, "max_grad_norm": 0.0},
    "schedule": {"warmup_steps": 20},
    "train": {"sequence_length": LENGTH, "global_batch_size": ROWS, "micro_batch_size": ROWS, "precision": "bf16"},
}  # fmt: skip
KINDS = {"fp32 masters (ZeRO-1)": "masters", "bf16, stochastic (fold)": "stochastic", "bf16, nearest (fold)": "nearest"}


@dataclass
class Batch:
    """A global batch."""

    inputs_BS: torch.Tensor
    targets_BS: torch.Tensor
    cu_seqlens: torch.Tensor | None = None


def corpus() -> torch.Tensor:
    """The bytes of the standard library's modules, about a megabyte."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:60]
    return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8).long()


def batch(text: torch.Tensor, step: int, seed: int) -> Batch:
    """ROWS windows at places that depend on step and seed alone."""
    drawn = random.Random(1000 * seed + step)
    rows = [text[start : start + LENGTH + 1] for start in (drawn.randrange(len(text) - LENGTH - 1) for _ in range(ROWS))]
    ids = torch.stack(rows)
    return Batch(ids[:, :-1], ids[:, 1:])


def configuration(kind: str, seed: int) -> RunConfig:
    """The run of one kind and seed."""
    overrides = [f"run.seed={seed}"]
    if kind != "masters":
        overrides += ["parallel.engine=fold", f"optimizer.rounding={kind}"]
    return build_config({section: dict(keys) for section, keys in BASE.items()}, overrides)


def train(_: int, world_size: int, kind: str, steps: int, seed: int) -> list[float]:
    """Losses of one run."""
    warnings.filterwarnings("ignore")  # DeepSpeed's own
    config, mesh, text = configuration(kind, seed), make_mesh(1, torch.device("cpu")), corpus()
    model = build_network(config, mesh)
    floors = rms_floors(model)
    if kind == "masters":
        engine = Zero(model, config.parallel, config.optimizer, config.train, mesh, floors)
    else:
        engine = Fold(model, config.optimizer, mesh, seed=seed, rms_floor=floors, bucket_numbers=1 << 20)
    losses = []
    for step in range(steps):
        losses.append(engine.accumulate([batch(text, step, seed)]).item())
        engine.update(config.optimizer.rate * multiplier(config.schedule, step, steps))
    engine.close()
    return losses


PAGE = """# bfloat16 with stochastic rounding against float32 masters

`python -m benchmarks.rounding --steps {steps} --seeds {seeds}`: a decoder of {parameters:.2f} million parameters on the bytes
of Python's standard library, Tiger at 2e-3, cosine; mean training loss (nats a byte) of the last {tail} steps, the same data
in every row of a column.

| weights and momentum | bytes per parameter | {heads} | mean | against masters |
|---|---|{rules}|---|---|
{rows}

One Tiger step is about a thousandth of a weight, less than half the spacing of bfloat16 numbers for most weights: rounded to
nearest, most of them stay where they are (Su 2023, kexue.fm/archives/9512; 70 % at a rate of 1e-3). A random rounding keeps
the mean of the step.

![training loss](stochastic_rounding.png)
"""


def picture(courses: dict[str, list[list[float]]], path: Path) -> None:
    """Loss over the steps, mean over seeds, smoothed over 10 steps."""
    figure = Figure(figsize=(7, 4))
    panel = figure.subplots()
    for name, runs in courses.items():
        mean = torch.tensor(runs).mean(0)
        smooth = mean.unfold(0, min(10, len(mean)), 1).mean(1)
        panel.plot(range(len(mean) - len(smooth) + 1, len(mean) + 1), smooth.tolist(), label=name)
    panel.set(xlabel="step", ylabel="training loss (nats a byte)")
    panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run every kind with every seed and write page and picture."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--steps", type=int, default=300)
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--output", type=Path, default=Path("docs/results"))
    given = arguments.parse_args()
    courses: dict[str, list[list[float]]] = {name: [] for name in KINDS}
    for seed in range(given.seeds):
        for name, kind in KINDS.items():
            courses[name].append(run_ranks(train, 1, kind, given.steps, seed, timeout_seconds=3600)[0])
            print(f"seed {seed}, {name}: {sum(courses[name][-1][-TAIL:]) / TAIL:.4f}", flush=True)
    finals = {name: [sum(run[-TAIL:]) / TAIL for run in runs] for name, runs in courses.items()}
    means = {name: sum(values) / len(values) for name, values in finals.items()}
    masters, rows = means[next(iter(KINDS))], []
    for (name, values), size in zip(finals.items(), ("2 + 4 + 4", "2 + 2", "2 + 2"), strict=True):
        cells = " | ".join(f"{value:.4f}" for value in values)
        rows.append(f"| {name} | {size} | {cells} | {means[name]:.4f} | {means[name] / masters - 1:+.2%} |")
    weights = build_network(configuration("masters", 0), Mesh()).parameters()
    parameters = sum(weight.numel() for weight in weights) / 1e6
    heads = " | ".join(f"seed {seed}" for seed in range(given.seeds))
    given.output.mkdir(parents=True, exist_ok=True)
    picture(courses, given.output / "stochastic_rounding.png")
    text = PAGE.format(
        steps=given.steps, seeds=given.seeds, parameters=parameters, tail=TAIL,
        heads=heads, rules="|".join(["---"] * given.seeds), rows="\n".join(rows),
    )  # fmt: skip
    (given.output / "stochastic_rounding.md").write_text(text)


if __name__ == "__main__":
    main()
