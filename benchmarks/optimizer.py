"""What an optimizer step costs: ours against torch's fused AdamW, folding against accumulating, Muon beside a whole step.

    python -m benchmarks.optimizer [--device cpu] [--compile] [--repeats 15] [--output docs/results]

The same parameters for every line. On the CPU the clock is the process's own CPU time on one thread and the best of the
repeats counts, variants taken in turn, so that other work on the machine matters little. Writes optimizer_step.md.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.contestants import SHAPES, Shape
from launch.config import RunConfig
from launch.load_config import build_config
from launch.network import build_network
from model.decoder import Decoder
from model.initialization import rms_floors
from model.parallel.mesh import Mesh
from trainer.engines.fold import Fold
from trainer.optimizers.config import OptimizerConfig
from trainer.optimizers.fragments import whole_fragments
from trainer.optimizers.rates import UpdateStep
from trainer.optimizers.step import Optimizer

SMALL = ["model.vocab_size=4096", "model.hidden_size=256", "model.intermediate_size=704", "model.num_hidden_layers=4"]
"""The quickstart's network, for whole steps."""
BASE: dict[str, Any] = {
    "model": {
        "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6, "num_attention_heads": 8,
    },
    "train": {"sequence_length": 256, "global_batch_size": 2, "micro_batch_size": 1, "precision": "fp32"},
}  # fmt: skip


@dataclass
class Batch:
    """Random ids."""

    inputs_BS: Tensor
    targets_BS: Tensor
    cu_seqlens: Tensor | None = None


def configuration(*overrides: str) -> RunConfig:
    """The network all lines share."""
    return build_config({section: dict(keys) for section, keys in BASE.items()}, overrides)


def clock(device: torch.device) -> float:
    """Seconds of CPU time, or of wall time once the GPU is done."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def best(variants: dict[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, float]:
    """Milliseconds of each, the least of several, taken in turn."""
    found = dict.fromkeys(variants, float("inf"))
    for _ in range(repeats + 2):  # the first ones warm up, and cannot be the least
        for name, run in variants.items():
            begun = clock(device)
            run()
            found[name] = min(found[name], 1e3 * (clock(device) - begun))
    return found


def ours(name: str, model: Decoder, mesh: Mesh, *, totals_alone: bool = False, **chosen: Any) -> Callable[[], Any]:
    """A step of trainer.optimizers.step on float32 masters; or only its first part, which torch's bare AdamW does without."""
    settings, fragments = (
        OptimizerConfig.model_validate({"name": name, **chosen}),
        whole_fragments(dict(model.named_parameters()), mesh),
    )
    for fragment in fragments:
        fragment.values = fragment.values.clone()
        fragment.gradient = torch.randn_like(fragment.values) * 1e-5
    moves = Optimizer(settings, fragments, mesh, rms_floors(model), partitioned=False)
    return moves.measure if totals_alone else lambda: moves.update(UpdateStep(9, settings.rate))


def theirs(model: torch.nn.Module, clip: bool) -> Callable[[], Any]:
    """torch.optim.AdamW(fused=True), with or without torch's clipping."""
    weights = [torch.nn.Parameter(weight.detach().clone()) for weight in model.parameters()]
    for weight in weights:
        weight.grad = torch.randn_like(weight) * 1e-5
    optimizer = torch.optim.AdamW(weights, fused=True)

    def step() -> None:
        if clip:
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()

    return step


def steps(device: torch.device, compiled: bool) -> tuple[dict[str, Callable[[], Any]], int]:
    """The variants of a step, and their number of parameters."""
    mesh = Mesh(device=device)
    model = build_network(configuration(), mesh)
    variants = {"torch AdamW, fused": theirs(model, False), "torch AdamW, fused, and clip_grad_norm_": theirs(model, True)}
    for name in ("adamw", "tiger", "lion"):
        variants[f"ours, {name}"] = ours(name, model, mesh)
    if compiled:
        for name in ("tiger", "lion"):
            variants[f"ours, {name}, optimizer.compile = true"] = ours(name, model, mesh, compile=True)
    variants["of ours, gradient norm"] = ours("lion", model, mesh, totals_alone=True)
    variants["of ours, gradient norm and RMS of matrices"] = ours("tiger", model, mesh, totals_alone=True)
    return variants, sum(weight.numel() for weight in model.parameters())


class Accumulating(Fold):
    """What fold replaces: gradients gather in `.grad` over the micro-batches, then the same step is taken on their sum."""

    def accumulate(self, batches: list[Any]) -> Tensor:
        """Forward and backward of every micro-batch, then each gradient into the momentum."""
        hooks, self._hooks = self._hooks, []
        for hook in hooks:
            hook.remove()
        count = sum((batch.targets_BS >= 0).sum() for batch in batches)
        for batch in batches:
            loss, _ = self.model(batch.inputs_BS, batch.targets_BS)
            (loss / count).backward()
        self._begin_step(1)
        self._begin_backward(0)
        for fragment, weight in zip(self._fragments, self.model.parameters(), strict=True):
            assert weight.grad is not None
            self._fold(fragment, weight.grad.view(-1))
            weight.grad = None
        return loss.detach()


def whole_steps(device: torch.device, precision: str, compiled: bool) -> dict[str, Callable[[], Any]]:
    """Forward, backward and update with two micro-batches: by hooks, and by accumulated gradients."""
    found = _whole_steps(device, precision)
    if compiled and precision == "bf16":
        found |= _whole_steps(device, precision, ", optimizer.compile = true", "optimizer.compile=true")
    return found


def _whole_steps(device: torch.device, precision: str, note: str = "", *overrides: str) -> dict[str, Callable[[], Any]]:
    config = configuration(*SMALL, "parallel.engine=fold", f"train.precision={precision}", *overrides)
    ids = torch.randint(config.model.vocab_size, (2, 8, 257), device=device, generator=torch.Generator(device).manual_seed(0))
    batches: list[Any] = [Batch(micro[:, :-1], micro[:, 1:]) for micro in ids]
    mesh, variants = Mesh(device=device), {}
    for name, kind in ((f"{precision}: fold{note}", Fold), (f"{precision}: accumulate, then step{note}", Accumulating)):
        model = build_network(config, mesh)
        floors = rms_floors(model)
        engine = kind(model, config.optimizer, mesh, seed=0, rms_floor=floors, bucket_numbers=1 << 22)

        def step(engine: Fold = engine) -> None:
            engine.accumulate(batches)
            engine.update(1e-3)

        variants[name] = step
    return variants


SEQUENCE = 512
"""Tokens of each sequence beside which Muon is timed."""


def beside(shape: Shape, device: torch.device) -> dict[str, Callable[[], Any]]:
    """Forward and backward in bfloat16 of a step's tokens, and updates of the same network on float32 masters."""
    sizes = [f"model.{key}={value}" for key, value in shape.model().items()]
    config = configuration(*sizes, "train.precision=bf16", f"train.sequence_length={SEQUENCE}")
    mesh = Mesh(device=device)
    model, masters = build_network(config, mesh), build_network(config, mesh).float()
    ids = torch.randint(shape.vocab_size, (shape.tokens // SEQUENCE, SEQUENCE + 1), device=device)

    def forward_and_backward() -> None:
        model(ids[:, :-1], ids[:, 1:])[0].backward()
        model.zero_grad()

    return {
        "forward and backward": forward_and_backward,
        "update, AdamW": ours("adamw", masters, mesh),
        "update, Muon": ours("muon", masters, mesh, muon={"precision": "bf16"}),
        "update, Muon with `precision = fp32`": ours("muon", masters, mesh, muon={"precision": "fp32"}),
    }


def beside_table(found: dict[str, dict[str, float]]) -> str:
    """A line for each network."""
    titles = list(next(iter(found.values())))
    lines = [f"| | {' | '.join(titles)} | Muon of a step | AdamW of a step |", "|---|" + "---|" * (len(titles) + 2)]
    for name, ms in found.items():
        work, adamw, muon, _ = ms.values()
        shares = (f"{update / (work + update):.1%}" for update in (muon, adamw))
        lines.append(f"| {name} | {' | '.join(f'{value:.1f}' for value in ms.values())} | {' | '.join(shares)} |")
    return "\n".join(lines)


PAGE = """# What an optimizer step costs

`python -m benchmarks.optimizer --device {device} --repeats {repeats}{flag}`: {parameters:.1f} million parameters
in {tensors} tensors, {where}; the least of {repeats} repeats.

| step on float32 masters | ms |
|---|---|
{steps}

Ours computes the gradient norm, clips and looks for NaN in every line; of torch's two lines the second clips. Tiger reads the
weights once more, for the RMS of each matrix: the last two lines are what this takes, and what a line of ours is longer by
than a bare update. Torch has no fused sign step: without a compiler it is several operations on what is in the cache, and
slower than AdamW's one kernel for it.

| forward, backward and update, 2 micro-batches of 2048 tokens | ms |
|---|---|
{whole}

The quickstart's network. Both lines of a pair take the same Tiger step; *accumulate* keeps a gradient
beside weights and momentum, *fold* does not. What folding adds is one more pass over the momentum for each further micro-batch,
whatever its number of tokens, rounding included.

Muon, with AdamW for what is no matrix, beside a step of {tokens:,} tokens in sequences of {sequence}, in bf16; milliseconds.
The networks are those of [step.md](step.md).

{beside}

Newton-Schulz takes as long for any number of tokens: its share falls as an update's batch grows, and grows with the width.
"""


def main() -> None:
    """Time everything and write the page."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--compile", action="store_true", help="also the compiled pass")
    arguments.add_argument("--repeats", type=int, default=15)
    arguments.add_argument("--output", type=Path, default=Path("docs/results"))
    given = arguments.parse_args()
    torch.set_num_threads(1)
    device = torch.device(given.device)
    variants, parameters = steps(device, given.compile)
    found = best(variants, given.repeats, device)
    print(found, flush=True)
    variants.clear()
    whole: dict[str, float] = {}
    for precision in ("bf16", "fp32"):
        whole |= best(whole_steps(device, precision, given.compile), max(1, given.repeats // 2), device)
        print(whole, flush=True)
    muon: dict[str, dict[str, float]] = {}
    for name in ("8m", "30m"):
        muon[name] = best(beside(SHAPES[name], device), max(1, given.repeats // 3), device)
        print(name, muon[name], flush=True)
    where = "one CPU thread, CPU time" if device.type == "cpu" else torch.cuda.get_device_name(device)
    tensors = len(list(build_network(configuration(), Mesh()).parameters()))
    tables = ["\n".join(f"| {name} | {ms:.1f} |" for name, ms in table.items()) for table in (found, whole)]
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / "optimizer_step.md").write_text(PAGE.format(
        device=given.device, repeats=given.repeats, flag=" --compile" if given.compile else "", parameters=parameters / 1e6,
        tensors=tensors, where=where, steps=tables[0], whole=tables[1], tokens=SHAPES["8m"].tokens, sequence=SEQUENCE,
        beside=beside_table(muon),
    ))  # fmt: skip


if __name__ == "__main__":
    main()
