"""Tiger, Lion and AdamW at several learning rates on one small run: which rate a short run wants, and which rule wins.

    python -m benchmarks.rates [--steps 300] [--seeds 1] [--output docs/results]

The network, text and schedule of benchmarks/rounding.py, in float32. Writes optimizer_rates.md.
"""

import argparse
from pathlib import Path

import torch

from benchmarks.rounding import BASE, LENGTH, ROWS, TAIL, batch, corpus
from launch.load_config import build_config
from launch.network import build_network
from model.initialization import rms_floors
from model.parallel.mesh import Mesh
from trainer.optimizers.fragments import whole_fragments
from trainer.optimizers.rates import UpdateStep
from trainer.optimizers.step import Optimizer
from trainer.schedule import multiplier

RULES: tuple[tuple[str, tuple[float, ...], tuple[float, ...]], ...] = (  # name, betas, rates
    ("tiger", (0.965,), (2e-3, 5e-3, 1e-2, 2e-2)),
    ("tiger", (0.9,), (5e-3, 1e-2, 2e-2)),
    ("lion", (0.95, 0.98), (1e-4, 3e-4, 1e-3)),
    ("lion", (0.9, 0.95), (3e-4, 1e-3)),
    ("adamw", (0.9, 0.95), (1e-3, 3e-3, 1e-2)),
)


def train(name: str, betas: tuple[float, ...], rate: float, steps: int, seed: int) -> float:
    """Mean loss of the last steps."""
    values = {section: dict(keys) for section, keys in BASE.items()}
    momentum = {"beta": betas[0]} if name == "tiger" else {"betas": list(betas)}
    values["optimizer"] = {"name": name, "max_grad_norm": 1.0, name: {"learning_rate": rate, **momentum}}
    config, alone, text, losses = build_config(values, ["train.precision=fp32"]), Mesh(), corpus(), []
    model = build_network(config, alone)
    fragments, weights = whole_fragments(dict(model.named_parameters()), alone), list(model.parameters())
    moves = Optimizer(config.optimizer, fragments, alone, rms_floors(model), partitioned=False)
    for step in range(steps):
        given = batch(text, step, seed)
        loss, count = model(given.inputs_BS, given.targets_BS)
        gradients = torch.autograd.grad(loss / count, weights)
        for fragment, gradient in zip(fragments, gradients, strict=True):
            fragment.gradient = gradient.reshape(-1)
        now = rate * multiplier(config.schedule, step, steps)
        moves.update(UpdateStep(step + 1, now))
        losses.append((loss.detach() / count).item())
    return sum(losses[-TAIL:]) / TAIL


PAGE = """# Learning rates for a short run

`python -m benchmarks.rates --steps {steps} --seeds {seeds}`: a decoder of 0.6 million parameters on the bytes of Python's
standard library, {steps} steps of {tokens} bytes, cosine, clipping at 1; mean training loss (nats a byte) of the last {tail}
steps.

| rule | betas | learning rate | loss |
|---|---|---|---|
{rows}
"""


def main() -> None:
    """Run every rule at every rate and write the page."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--steps", type=int, default=300)
    arguments.add_argument("--seeds", type=int, default=1)
    arguments.add_argument("--output", type=Path, default=Path("docs/results"))
    given = arguments.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, betas, rates in RULES:
        for rate in rates:
            found = [train(name, betas, rate, given.steps, seed) for seed in range(given.seeds)]
            rows.append(f"| {name} | {', '.join(map(str, betas))} | {rate:g} | {sum(found) / len(found):.4f} |")
            print(rows[-1], flush=True)
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / "optimizer_rates.md").write_text(
        PAGE.format(steps=given.steps, seeds=given.seeds, tokens=ROWS * LENGTH, tail=TAIL, rows="\n".join(rows))
    )  # fmt: skip


if __name__ == "__main__":
    main()
