"""How the time of a token grows: with length, layers, vocabulary, micro-batch and ranks.

    python -m benchmarks.growth [--sweep NAME ...] [--compile] [--rounds R] [--output docs/results]

One size is changed at a time; the step keeps its tokens, except where the micro-batch is what changes. Each point is a
process (or several ranks) of tiglon with one thread, driven as in benchmarks/step.py; its time is the least of the rounds.
Beside the time stand the operations of a token (model/flops.py, the causal half of attention), so that what grows faster
than its operations shows. An exponent e is the slope of log time over log size: 0 = a token costs the same at every size.
"""

import argparse
import functools
import json
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch

from benchmarks.contestants import Contestant, Shape, Trainer
from model.config import ModelConfig
from model.flops import flops_per_token
from model.sizes import parameter_counts

BASE = Shape(8192, 256, 704, 4, 4, 4, 8192)


@dataclass(frozen=True)
class Point:
    """One network and step."""

    size: int
    shape: Shape = BASE
    length: int = 512
    options: dict[str, Any] = field(default_factory=dict)
    ranks: int = 1
    threads: int = 1
    note: str = ""


def _with(**sizes: int) -> Shape:
    return replace(BASE, **sizes)


def _lengths(**options: Any) -> list[Point]:
    return [Point(n, _with(tokens=16384), n, options) for n in (512, 1024, 2048, 4096, 8192, 16384)]


SWEEPS: dict[str, tuple[str, Callable[[], list[Point]]]] = {
    "length": ("tokens per sequence, 16,384 per step", _lengths),
    "length, compiled": ("tokens per sequence, 16,384 per step", functools.partial(_lengths, compile=True)),
    "layers": ("layers", lambda: [Point(n, _with(num_hidden_layers=n)) for n in (2, 4, 8, 16)]),
    "vocabulary": ("pieces", lambda: [Point(n, _with(vocab_size=n)) for n in (8192, 32768, 131072, 262144)]),
    "micro-batch": ("sequences of 512 tokens in one pass", lambda: [Point(n, _with(tokens=512 * n)) for n in (1, 2, 4, 8, 16)]),
    "ranks": (
        "ranks that share 8,192 tokens and the cores",
        lambda: [
            Point(1, threads=2, note="two threads"),
            *(
                Point(n, note=f"one thread each, {name}", ranks=n, options=options)
                for name, options in ENGINES
                for n in (1, 2, 4)
            ),
            Point(2, note="one thread each, ZeRO 1, tensor 2", ranks=2, options={"tensor_parallel_size": 2}),
        ],
    ),
}
ENGINES: list[tuple[str, dict[str, Any]]] = [
    ("ZeRO 1", {"zero_stage": 1}),
    ("ZeRO 2", {"zero_stage": 2}),
    ("ZeRO 3", {"zero_stage": 3}),
    ("fold", {"engine": "fold", "optimizer": "tiger"}),
]


def measure(point: Point, compiled: bool, rounds: int, folder: Path) -> dict[str, Any]:
    """Milliseconds a thousand tokens, and the operations of one."""
    os.environ["OMP_NUM_THREADS"] = str(point.threads)
    shape = point.shape
    job = {"model": shape.model(), "length": point.length, "batch": max(1, shape.tokens // point.length)}
    job |= {"device": "cuda" if torch.cuda.is_available() else "cpu", "learning_rate": 3e-4}
    options = point.options | ({"compile": True} if compiled else {})
    trainer = Trainer(Contestant("tiglon", "tiglon", options=options, ranks=point.ranks), job, folder)
    try:
        trainer.start()
        for _ in range(rounds):
            trainer.round(1)
    finally:
        trainer.stop()
    if trainer.reason:
        raise RuntimeError(trainer.reason)
    config = ModelConfig(**job["model"])
    tokens = job["batch"] * point.length
    best, cpu = (min(answer[kind] for answer in trainer.answers) for kind in ("seconds", "cpu_seconds"))
    return {
        "size": point.size, "note": point.note, "tokens": tokens, "parameters": parameter_counts(config)["total"],
        "ms_per_thousand_tokens": 1e6 * best / tokens, "cpu_ms_per_thousand_tokens": 1e6 * cpu / tokens,
        "flops_per_token": flops_per_token(config, point.length, True),
        "memory_bytes": max(answer["memory_bytes"] for answer in trainer.answers),
    }  # fmt: skip


def exponent(rows: list[dict[str, Any]], key: str) -> float:
    """Slope of log(row[key]) over log(row["size"]), by least squares."""
    xs, ys = [math.log(row["size"]) for row in rows], [math.log(row[key]) for row in rows]
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)


def section(name: str, rows: list[dict[str, Any]]) -> list[str]:
    """A table; for sizes of the network the exponents as well."""
    lines = [f"## {name.capitalize()}", ""]
    if name != "ranks":
        slopes = [exponent(rows, key) for key in ("ms_per_thousand_tokens", "flops_per_token")]
        last = exponent(rows[-2:], "ms_per_thousand_tokens")
        lines += [
            f"Exponent of the time of a token **{slopes[0]:+.2f}**, between the last two {last:+.2f}; of its operations "
            f"{slopes[1]:+.2f}.", "",
        ]  # fmt: skip
    lines += [
        f"| {SWEEPS[name][0]} | ms a thousand tokens | of the first | operations of the first | GFLOP/s | peak memory, GB |"
    ]
    lines += ["|---|---|---|---|---|---|"]
    first = rows[0]
    for row in rows:
        time, flops = row["ms_per_thousand_tokens"], row["flops_per_token"]
        label = f"{row['size']:,}" + (f", {row['note']}" if row["note"] else "")
        slower, more = time / first["ms_per_thousand_tokens"], flops / first["flops_per_token"]
        speed, memory = flops / time / 1e3, row["memory_bytes"] / 1e9
        lines.append(f"| {label} | {time:,.0f} | {slower:.2f} | {more:.2f} | {speed:,.0f} | {memory:.2f} |")
    return [*lines, ""]


def draw(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Time of a token beside its operations, both as multiples of the first point."""
    sizes = {name: rows for name, rows in found.items() if name != "ranks"}
    figure, axes = plt.subplots(1, len(sizes), figsize=(3.6 * len(sizes), 3.4), squeeze=False)
    for axis, (name, rows) in zip(axes[0], sizes.items(), strict=True):
        for key, label in (("ms_per_thousand_tokens", "time of a token"), ("flops_per_token", "operations of a token")):
            axis.loglog([row["size"] for row in rows], [row[key] / rows[0][key] for row in rows], "o-", label=label, base=2)
        axis.set_xlabel(f"{name}: {SWEEPS[name][0]}", fontsize=8)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("of the first point")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write(found: dict[str, list[dict[str, Any]]], about: str, output: Path) -> None:
    """growth.md, growth.png and growth.json."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "growth.json").write_text(json.dumps({"about": about, "sweeps": found}, indent=1) + "\n")
    lines = ["# How the time of a token grows", "", about, ""]
    if any(name != "ranks" for name in found):
        draw(found, output / "growth.png")
        lines += ["![time and operations of a token](growth.png)", ""]
    for name, rows in found.items():
        lines += section(name, rows)
    (output / "growth.md").write_text("\n".join(lines).rstrip() + "\n")


def main() -> None:
    """Measure every point, write the page after every sweep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", nargs="+", choices=list(SWEEPS), default=list(SWEEPS))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    given = parser.parse_args()
    kept = given.output / "growth.json"
    found = json.loads(kept.read_text())["sweeps"] if kept.exists() else {}
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores, one thread a rank"
    about = (
        f"`python -m benchmarks.growth`: {BASE.num_hidden_layers} layers of {BASE.hidden_size}, {BASE.vocab_size:,} pieces, "
        f"{BASE.tokens:,} tokens a step in sequences of 512 unless a table says otherwise; bfloat16, AdamW (fold: Tiger), "
        f"{'compiled' if given.compile else 'eager'}; {where}; the least of {given.rounds} steps."
    )
    for name in given.sweep:
        rows = []
        for point in SWEEPS[name][1]():
            if torch.cuda.device_count() == 1 and point.ranks > 1:
                continue
            with tempfile.TemporaryDirectory() as folder:
                rows.append(measure(point, given.compile, given.rounds, Path(folder)))
            print(name, rows[-1], flush=True)
        found[name] = rows
        write({one: found[one] for one in SWEEPS if one in found}, about, given.output)


if __name__ == "__main__":
    main()
