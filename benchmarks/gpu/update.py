"""The update of every optimizer alone: milliseconds, and its share of the bandwidth that a plain copy reaches."""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks import optimizer
from benchmarks.contestants import SHAPES
from benchmarks.gpu.figures import Part
from benchmarks.gpu.steps import TINY
from launch.config import RunConfig
from launch.load_config import build_config
from launch.network import build_network
from model.initialization import rms_floors
from model.parallel.mesh import Mesh
from model.sizes import parameter_counts
from trainer.engines.fold import Fold

RULES: dict[str, tuple[str, dict[str, Any], int]] = {
    "adamw": ("adamw", {}, 32),
    "tiger": ("tiger", {}, 28),
    "tiger, compiled": ("tiger", {"compile": True}, 28),
    "lion": ("lion", {}, 24),
    "lion, compiled": ("lion", {"compile": True}, 24),
}
"""Name -> (rule, settings, bytes per parameter of float32 weights, gradient and states that one update has to move: each
read once, each changed one written once, and once more what the norm and the RMS need)."""
FOLD_BYTES = 14
"""Gradient and momentum in, momentum out; weights for the RMS; weights and momentum in, weights out: 2 bytes each."""


def measure(part: Part) -> None:
    """All rules on a network of 1B, each on its own."""
    for name, (rule, settings, each) in RULES.items():
        part.attempt("update", lambda r=rule, s=settings, b=each: by_rule(part, r, s, b), rule=name)
        if part.device.type == "cuda":
            torch.cuda.empty_cache()
    part.attempt("update", lambda: folded(part), rule="fold, compiled")


def configuration(part: Part, *overrides: str) -> RunConfig:
    """The network whose parameters are updated."""
    model = TINY if part.tiny else SHAPES["1b"].model()
    train = {"sequence_length": 64, "global_batch_size": 1, "micro_batch_size": 1, "precision": "bf16"}
    return build_config({"model": model, "train": train}, overrides)


def by_rule(part: Part, rule: str, settings: dict[str, Any], each: int) -> dict[str, Any]:
    """One update of trainer/optimizers/step.py on float32 masters."""
    mesh = Mesh(device=part.device)
    config = configuration(part, "train.precision=fp32")
    with torch.no_grad():
        update = optimizer.ours(rule, build_network(config, mesh), mesh, **settings)
    return timed(part, update, parameter_counts(config.model)["total"], each)


def folded(part: Part) -> dict[str, Any]:
    """One gradient of every parameter into the momentum, and the update, in bfloat16."""
    mesh = Mesh(device=part.device)
    config = configuration(part, "parallel.engine=fold", "optimizer.name=tiger", "optimizer.compile=true")
    model = build_network(config, mesh)
    engine = Fold(model, config.optimizer, mesh, seed=0, rms_floor=rms_floors(model), bucket_numbers=1 << 22)
    gradients = {name: torch.randn_like(weight).view(-1) * 1e-5 for name, weight in model.named_parameters()}

    def update() -> None:
        engine._begin_step(1)
        engine._begin_backward(0)
        for fragment in engine.fragments():
            engine._fold(fragment, gradients[fragment.name])
        engine.update(1e-3)

    return timed(part, update, parameter_counts(config.model)["total"], FOLD_BYTES)


def timed(part: Part, update: Callable[[], object], count: int, each: int) -> dict[str, Any]:
    """Milliseconds of an update, the host's launches included, and the bandwidth it comes to."""
    seconds = part.seconds(update, repeats=3 if part.tiny else 10)
    return {
        "ms": round(1e3 * seconds, 3), "parameters": count, "bytes_per_parameter": each,
        "tb_per_second": round(count * each / seconds / 1e12, 3),
    }  # fmt: skip
