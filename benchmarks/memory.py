"""Bytes of training state a parameter, from the live tensors of a network of 110 million parameters.

    python -m benchmarks.memory [--output docs/results]

State is every tensor alive after the last backward and before the update: weights, masters, optimizer state, gradients.
Beside it: what `tiglon plan` computes, the largest single gradient, and the peak resident memory of the process.
Writes training_state.md.
"""

import argparse
import gc
import resource
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from launch.config import RunConfig
from launch.load_config import build_config
from launch.network import build_network
from launch.planner.memory import layout_of, state
from model.initialization import rms_floors
from model.parallel.mesh import make_mesh
from tests.ranks import run_ranks
from trainer.engines.fold import Fold
from trainer.engines.zero import Zero

BASE: dict[str, Any] = {
    "model": {
        "vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
        "tie_word_embeddings": True,
    },
    "train": {"sequence_length": 64, "global_batch_size": 2, "micro_batch_size": 1, "precision": "bf16"},
    "parallel": {"reduce_bucket_elements": 5_000_000},
}  # fmt: skip
FOLDED_MUON = (
    "parallel.engine=fold", "optimizer.name=muon", "optimizer.muon.nesterov=false", "optimizer.muon.others=tiger",
)  # fmt: skip
CASES = {
    "fold, Tiger, bf16": (1, ["parallel.engine=fold"]),
    "fold, Tiger, fp32": (1, ["parallel.engine=fold", "train.precision=fp32"]),
    "fold, Muon and Tiger, bf16": (1, [*FOLDED_MUON]),
    "ZeRO-1, Tiger": (1, []),
    "ZeRO-1, AdamW": (1, ["optimizer.name=adamw"]),
    "fold, Tiger, bf16, 2 ranks": (2, ["parallel.engine=fold"]),
    "fold, Muon and Tiger, bf16, 2 ranks": (2, [*FOLDED_MUON]),
    "ZeRO-1, Tiger, 2 ranks": (2, []),
    "ZeRO-1, AdamW, 2 ranks": (2, ["optimizer.name=adamw"]),
}


@dataclass
class Batch:
    """Random ids; their values do not matter here."""

    inputs_BS: torch.Tensor
    targets_BS: torch.Tensor
    cu_seqlens: torch.Tensor | None = None


def live_bytes() -> int:
    """Bytes of every tensor storage alive in this process, gradients included."""
    gc.collect()
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
        for tensor in tensors + [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]:
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def measure(_: int, world_size: int, overrides: list[str]) -> dict[str, int]:
    """One update of a real engine on a real network."""
    warnings.filterwarnings("ignore")  # DeepSpeed's own
    config = build_config({section: dict(keys) for section, keys in BASE.items()}, overrides)
    mesh = make_mesh(1, torch.device("cpu"))
    begun, resident = live_bytes(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = build_network(config, mesh)
    parameters = sum(weight.numel() for weight in model.parameters())
    largest = max(weight.numel() for weight in model.parameters()) * next(model.parameters()).element_size()
    engine = engine_of(config, model, mesh, world_size)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.model.vocab_size, (layout_of(config, world_size).micro_batches, 1, 65), generator=generator)
    engine.accumulate([Batch(row[:, :-1], row[:, 1:]) for row in ids])
    held = live_bytes() - begun - ids.untyped_storage().nbytes()
    engine.update(1e-3)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    engine.close()
    return {"state": held, "parameters": parameters, "largest": largest, "resident": 1024 * (peak - resident)}


def engine_of(config: RunConfig, model: Any, mesh: Any, world_size: int) -> Zero | Fold:
    """The engine the configuration names."""
    floors = rms_floors(model)
    if config.parallel.engine == "fold":
        bucket = config.parallel.reduce_bucket_elements
        return Fold(model, config.optimizer, mesh, seed=0, rms_floor=floors, bucket_numbers=bucket)
    return Zero(model, config.parallel, config.optimizer, config.train, mesh, floors)


PAGE = """# Training state: bytes per parameter

`python -m benchmarks.memory`: {parameters:.1f} million parameters, tied head, CPU.

*State* is what is alive between the last backward and the update: weights, masters, optimizer state and gradients, divided
by the parameters of the network; *planned* is what `tiglon plan` computes. The fold engine has no gradients then: the largest
single one exists for the length of its hook. In bf16 it keeps the indexes of rows and columns from which rounding makes its
random bits, which are not planned. *Resident* is what the process grew by at its peak, with activations and buffers.

| engine | state, bytes per parameter | planned | difference | largest gradient, MB | resident, bytes per parameter |
|---|---|---|---|---|---|
{rows}
"""


def main() -> None:
    """Measure every case and write the page."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--output", type=Path, default=Path("docs/results"))
    given = arguments.parse_args()
    rows, parameters = [], 0
    for name, (ranks, overrides) in CASES.items():
        config = build_config({section: dict(keys) for section, keys in BASE.items()}, overrides)
        planned = state(config, layout_of(config, ranks)).training_state
        found = run_ranks(measure, ranks, overrides, timeout_seconds=900)
        most, parameters = max(found, key=lambda one: one["state"]), found[0]["parameters"]
        each = [most["state"] / parameters, planned / parameters]
        row = f"| {name} | {each[0]:.3f} | {each[1]:.3f} | {each[0] / each[1] - 1:+.1%} | {most['largest'] / 1e6:.1f} | "
        rows.append(row + f"{max(one['resident'] for one in found) / parameters:.2f} |")
        print(rows[-1], flush=True)
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / "training_state.md").write_text(PAGE.format(parameters=parameters / 1e6, rows="\n".join(rows)))


if __name__ == "__main__":
    main()
