"""The largest Llama-shaped network that one device trains with the fold engine: 4 bytes per parameter, and what a step needs.

    python -m benchmarks.largest [--device auto|cpu|cuda] [--length N] [--steps N] [--memory-bytes N] [--output docs/results]

The planner picks the network: a layer for every 128 of its width, full recomputation, one sequence a step, and then as many
layers as fit. It is then trained, on random tokens that it can learn by heart, and its peak memory is held against the plan.
--memory-bytes pretends a smaller device, which is how a CPU shows the whole way. Writes largest.json and largest.md.
"""

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.tiglon import Batch, started
from launch import runtime
from launch.config import RunConfig
from launch.engine import make_engine
from launch.load_config import build_config
from launch.planner.memory import layout_of, memory
from launch.planner.search import USABLE
from launch.summary import peak_flops
from model.flops import flops_per_token
from model.parallel.mesh import make_mesh
from model.sizes import parameter_counts
from trainer.session import peak_memory_bytes

BATCHES = 4


def configuration(width: int, layers: int, length: int, vocab_size: int, compiled: bool) -> RunConfig:
    """Llama 3's proportions: heads of 128 (64 in narrow ones), four of them to a key head, an mlp of 3.5 widths."""
    size = 128 if width >= 1024 else 64
    heads = width // size
    return build_config({
        "model": {
            "vocab_size": vocab_size, "hidden_size": width, "intermediate_size": width * 7 // 2, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": max(1, heads // 4), "head_dim": size,
            "tie_word_embeddings": False,
        },
        "optimizer": {"name": "tiger"},
        "train": {
            "sequence_length": length, "micro_batch_size": 1, "global_batch_size": 1, "precision": "bf16", "recompute": "full",
            "compile": compiled,
        },
        "parallel": {"engine": "fold"},
    })  # fmt: skip


def planned(config: RunConfig, device: str) -> int:
    """Peak bytes by the planner."""
    return memory(config, layout_of(config, 1), device).peak


def largest(room: float, length: int, vocab_size: int, device: str, compiled: bool) -> RunConfig:
    """The widest network of a layer for every 128 of width that fits `room` bytes, then with as many layers as fit.

    Raises:
        ValueError: not even the smallest fits.
    """

    def of(width: int, layers: int) -> RunConfig:
        return configuration(width, layers, length, vocab_size, compiled)

    widths = [256, 512, 768, *range(1024, 32768, 512)]  # whose heads come in fours
    width = max((width for width in widths if planned(of(width, width // 128), device) <= room), default=widths[0])
    layers = width // 128
    while planned(of(width, layers + 1), device) <= room:
        layers += 1
    found = of(width, layers)
    if planned(found, device) > room:
        raise ValueError(f"{room / 1e9:.2f} GB hold no network of width {width} with {vocab_size} pieces; give more")
    return found


def train(config: RunConfig, device: torch.device, steps: int) -> dict[str, Any]:
    """Train on random tokens; losses, speed and peak memory."""
    before = peak_memory_bytes(device)
    engine = make_engine(config, make_mesh(1, device))
    generator, shape = torch.Generator().manual_seed(0), (BATCHES, 1, config.train.sequence_length + 1)
    ids = torch.randint(config.model.vocab_size, shape, generator=generator).to(device)
    losses, begin = [], 0.0
    for step in range(steps):
        rows = ids[step % BATCHES]
        loss = engine.accumulate([Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())])
        engine.update(config.optimizer.rate)
        assert loss is not None
        if step == 0:
            losses.append(float(loss))  # the first step compiles
            begin = time.perf_counter()
    losses.append(float(loss))
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    peak = peak_memory_bytes(device) - (0 if device.type == "cuda" else before)
    engine.close()
    return {"steps": steps, "losses": losses, "step_seconds": seconds / max(1, steps - 1), "peak_bytes": peak}


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Plan, train, compare."""
    device, here = started(given.device), runtime.world()
    room = USABLE * (given.memory_bytes or runtime.memory_capacity_bytes(device, here))
    config = largest(room, given.length, given.vocab_size, device.type, given.compile)
    count, plan = parameter_counts(config.model)["total"], planned(config, device.type)
    model = config.model
    print(f"{count / 1e9:.3f} billion parameters: {model.num_hidden_layers} layers of {model.hidden_size}", flush=True)
    found = train(config, device, given.steps)
    speed = given.length / found["step_seconds"]
    operations, peak = [flops_per_token(model, given.length, causal) for causal in (True, False)], peak_flops(device, "bf16")
    return {
        "command": "python -m benchmarks.largest " + shlex.join(sys.argv[1:]),
        "where": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{runtime.cores()} CPU cores",
        "torch": torch.__version__, "device_bytes": room / USABLE, "length": given.length, "parameters": count,
        "model": model.model_dump(exclude_defaults=True), "planned_bytes": plan, "tokens_per_second": speed,
        "mfu": [speed * each / peak for each in operations],
        "bytes_per_parameter": found["peak_bytes"] / count, **found,
    }  # fmt: skip


def lines(found: dict[str, Any]) -> list[str]:
    """The result as a page."""
    model, (first, last), plan, peak = found["model"], found["losses"], found["planned_bytes"], found["peak_bytes"]
    row = {
        "parameters": f"{found['parameters'] / 1e9:.3f} billion",
        "layers x width": f"{model['num_hidden_layers']} x {model['hidden_size']}",
        "tokens/s": f"{found['tokens_per_second']:,.1f}",
        "MFU causal / full": " / ".join(f"{share:.1%}" for share in found["mfu"]),
        "peak memory": f"{peak / 1e9:.2f} GB",
        "planned": f"{plan / 1e9:.2f} GB ({plan / peak - 1:+.1%})",
        "bytes per parameter": f"{found['bytes_per_parameter']:.2f}",
        "loss, first / last": f"{first:.3f} / {last:.3f}",
    }
    return [
        "# The largest network that one device trains", "",
        f"`{found['command']}` on {found['where']}, {found['device_bytes'] / 1e9:.1f} GB to plan with, torch {found['torch']}: "
        f"fold, Tiger, bfloat16, full recomputation, one sequence of {found['length']:,} tokens a step, "
        f"{found['steps']} steps. On a CPU the peak is the growth of resident memory, the compiler's own included.", "",
        "| " + " | ".join(row) + " |", "|---" * len(row) + "|", "| " + " | ".join(row.values()) + " |",
    ]  # fmt: skip


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--length", type=int, default=2048, help="tokens of the sequence")
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--memory-bytes", type=float, default=0, help="of the device (default: what it has)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--output", type=Path, help="folder of largest.json and largest.md")
    given = parser.parse_args()
    found = measure(given)
    page = lines(found)
    print("\n".join(page[2:]))
    if given.output:
        (given.output / "largest.json").write_text(json.dumps(found, indent=1) + "\n")
        (given.output / "largest.md").write_text("\n".join(page) + "\n")


if __name__ == "__main__":
    main()
