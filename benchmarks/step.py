"""Training speed of tiglon and of its peers on the hardware at hand, in one run.

    python -m benchmarks.step --shape 8m|30m|125m|1b|3b|8b|quickstart --length N [--json FILE] [--device auto|cpu|cuda]
        [--rounds R] [--steps K] [--threads N] [--only NAME ...] [--output docs/results]

Every trainer trains the same Llama-shaped network on the same random tokens in bfloat16 in a process of its own; peers
live in environments that this command makes under build/peers. Each is started alone, with an empty compile cache, and
timed to its first step. Then in every round each trains K steps in turn while the others sleep. A round begins with a
measured matrix product, the ceiling that utilisation is taken of. Where all do not fit a GPU at once (--alone), each is
started anew in every round. On a CPU that others use too, tokens per second of processor time say more than tokens/s:
measure with --threads 1, since threads that wait for each other burn processor time. --output also writes the page and
the plot of everything measured so far.
"""

import argparse
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.contestants import CONTESTANTS, SHAPES, Contestant, Trainer
from benchmarks.step_page import called, write_page
from launch import runtime
from launch.planner.time import ACCELERATORS
from model.config import ModelConfig
from model.flops import flops_per_token
from model.sizes import parameter_counts


def matrix_ceiling(device: torch.device) -> float:
    """Operations per second of the best of a few square bfloat16 products, on all cores or on the GPU."""
    best = 0.0
    for size in (4096, 8192) if device.type == "cuda" else (1024, 2048):
        a = torch.randn(size, size, device=device).bfloat16()
        for _ in range(4):
            if device.type == "cuda":
                torch.cuda.synchronize()
            begin = time.perf_counter()
            a @ a
            if device.type == "cuda":
                torch.cuda.synchronize()
            best = max(best, 2.0 * size**3 / (time.perf_counter() - begin))
    return best


def data_sheet(device: torch.device) -> float | None:
    """The GPU's dense bfloat16 peak (operations per second); None where it is not in the planner's table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).lower().replace(" ", "")
    return next((known.matrix_flops for known in ACCELERATORS.values() if known.name in name), None)


def compete(
    trainers: list[Trainer], rounds: int, steps: int, alone: bool, device: torch.device, say: Console
) -> Iterator[list[float]]:
    """Start everyone, warm up, and run the rounds; after each, the matrix products measured so far (operations per second)."""
    ceilings = [matrix_ceiling(device)]
    for trainer in [] if alone else trainers:
        trainer.start()
        trainer.warm_up(2)
        say.print(f"{trainer.contestant.name}: {trainer.reason or _waited(trainer)}")
    for number in range(rounds):
        ceilings.append(matrix_ceiling(device))
        for trainer in trainers if number % 2 == 0 else trainers[::-1]:
            if alone and not trainer.reason:
                trainer.start()
                trainer.warm_up(2)
            trainer.round(steps)
            if alone:
                trainer.stop()
        say.print(f"round {number + 1} of {rounds}: matrix product {ceilings[-1] / 1e12:.2f} TFLOP/s")
        yield ceilings


def _waited(trainer: Trainer) -> str:
    return f"start {trainer.startup_seconds:.1f} s, first step {trainer.first_step_seconds:.1f} s"


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """tiglon's fastest row with the peers' optimizer, over the fastest peer, on the same hardware.

    Where none with that optimizer ran, the fastest with Tiger takes its place, and `ratio_note` says so.
    """
    done = [row for row in rows if "reason" not in row]
    alike = [row for row in done if not row["peer"] and row["optimizer"] == "AdamW"]
    own = alike or [row for row in done if not row["peer"]]
    peers = [row for row in done if row["peer"]]
    if not own or not peers:
        return {"ratio_to_best_peer": None}
    found: dict[str, Any] = {} if alike else {"ratio_note": _note(rows)}
    wanted = {
        "ratio_to_best_peer": "tokens_per_second",
        "ratio_in_first_minute": "tokens_in_first_minute",
        "ratio_in_cpu_time": "tokens_per_cpu_second",
    }
    for key, value in wanted.items():
        best, other = (max(group, key=lambda row: row[value]) for group in (own, peers))
        found[key] = best[value] / other[value] if other[value] else None
        found[key.replace("ratio", "names")] = [best["name"], other["name"]]
    return found


def _note(rows: list[dict[str, Any]]) -> str:
    """Why the ratio is of a row with Tiger."""
    reasons = [row.get("reason", "") for row in rows if not row["peer"] and row["optimizer"] == "AdamW"]
    short = any("out of memory" in reason for reason in reasons)
    return f"with Tiger under fold: {'AdamW does not fit' if short else 'no row with AdamW ran'}"


def table(result: dict[str, Any]) -> Table:
    """The rows as a person reads them."""
    best = max((row["tokens_per_second"] for row in result["rows"] if row["peer"] and "reason" not in row), default=None)
    title = f"{result['shape']} ({result['parameters'] / 1e6:.1f}M), length {result['length']}, {result['where']}"
    shown = Table(title=title)
    for heading in (
        "trainer",
        "tokens/s",
        "of best peer",
        "tokens/CPU s",
        "MFU causal / full",
        "peak memory",
        "start",
        "first step",
    ):
        shown.add_column(heading, justify="left" if heading == "trainer" else "right")
    for row in result["rows"]:
        if "reason" in row:
            shown.add_row(called(row), row["reason"])
            continue
        share = f"{row['tokens_per_second'] / best:.2f}" if best else ""
        shown.add_row(
            called(row), f"{row['tokens_per_second']:,.0f}", share, f"{row['tokens_per_cpu_second']:,.0f}",
            f"{row['mfu_causal_of_measured']:.1%} / {row['mfu_full_of_measured']:.1%}", f"{row['memory_bytes'] / 1e9:.2f} GB",
            f"{row['startup_seconds']:.1f} s", f"{row['first_step_seconds']:.1f} s",
        )  # fmt: skip
    return shown


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="8m")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--batch", type=int, default=0, help="sequences a step (default: by shape)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="steps of each trainer in a round")
    parser.add_argument("--threads", type=int, default=0, help="of each trainer on a CPU (default: each trainer's own)")
    parser.add_argument("--only", nargs="*", default=[], help="trainers of these names, or whose name contains one of these")
    parser.add_argument(
        "--recompute",
        choices=["none", "selective", "full"],
        help="activations that every trainer recomputes; peers know none and full (default: none, and full for a trainer "
        "that runs out of a GPU's memory without)",
    )
    parser.add_argument(
        "--alone", action="store_true", help="start each trainer anew in every round (on a GPU always from 1b on)"
    )
    parser.add_argument(
        "--peers-here",
        action="store_true",
        help="peers in this very Python, which has them, and not in environments of their own",
    )
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--output", type=Path, help="folder of step.md, step.png and the results they show")
    return parser.parse_args()


def recomputation(one: Contestant, given: argparse.Namespace) -> str:
    """What a trainer recomputes in its backward: none, selective or full."""
    if given.recompute is None:
        return "none"
    return "full" if one.peer and given.recompute == "selective" else given.recompute


def chosen(given: argparse.Namespace) -> list[Contestant]:
    """Contestants by name, with their recomputation."""
    names = {one.name for one in CONTESTANTS}
    wanted = [lambda name, text=text: name == text if text in names else text in name for text in given.only]
    found = [one for one in CONTESTANTS if not wanted or any(fits(one.name) for fits in wanted)]
    return [replace(one, options=one.options | {"recompute": recomputation(one, given)}) for one in found]


def main() -> None:
    """Measure, print, write; what was measured is written after every round."""
    given, say = options(), Console(width=160)
    for name in [name for name in os.environ if name.startswith(("OMP_", "MKL_"))]:
        del os.environ[name]  # every trainer with its own defaults
    if given.threads:
        os.environ["OMP_NUM_THREADS"] = str(given.threads)
    torch.set_num_threads(given.threads or os.cpu_count() or 1)
    device = runtime.choose_device(given.device, runtime.world())
    shape = SHAPES[given.shape]
    batch = given.batch or max(1, shape.tokens // given.length)
    job = {"model": shape.model(), "length": given.length, "batch": batch, "device": device.type, "learning_rate": 3e-4}
    alone = given.alone or (device.type == "cuda" and given.shape in ("1b", "3b", "8b"))
    with tempfile.TemporaryDirectory() as folder:
        frugal = given.recompute is None and device.type == "cuda"
        trainers = [
            Trainer(one, job, Path(folder), here=given.peers_here, frugal=frugal)
            for one in chosen(given)
            if one.runs_on(device.type)
        ]
        try:
            for ceilings in compete(trainers, given.rounds, given.steps, alone, device, say):
                result = judged(given, job, trainers, ceilings, device)
                write(result, given)
        finally:
            for trainer in trainers:
                trainer.stop()
    say.print(table(result))
    say.print({key: value for key, value in result.items() if key.startswith(("ratio", "names"))})


def judged(
    given: argparse.Namespace, job: dict[str, Any], trainers: list[Trainer], ceilings: list[float], device: torch.device
) -> dict[str, Any]:
    """Everything that is known of the run so far."""
    config = ModelConfig(**job["model"])
    peaks = {"measured": max(ceilings)}
    if (sheet := data_sheet(device)) is not None:
        peaks["data_sheet"] = sheet
    counts = {f"flops_per_token_{name}": flops_per_token(config, given.length, name == "causal") for name in ("causal", "full")}
    rows = [trainer.row(counts, peaks) for trainer in trainers]
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    return {
        "command": "python -m benchmarks.step " + shlex.join(sys.argv[1:]), "shape": given.shape, "length": given.length,
        "batch": job["batch"], "device": device.type, "where": where, "threads": given.threads,
        "load": os.getloadavg()[1], "torch": torch.__version__, "parameters": parameter_counts(config)["total"],
        "ceiling_flops": peaks, "ceilings": ceilings, **counts, **summarise(rows), "rows": rows,
    }  # fmt: skip


def write(result: dict[str, Any], given: argparse.Namespace) -> None:
    """To the file and the page that were asked for."""
    text = json.dumps(result, indent=1) + "\n"
    if given.json:
        given.json.write_text(text)
    if given.output:
        (given.output / f"step-{result['shape']}-{result['length']}-{result['device']}.json").write_text(text)
        write_page(given.output)


if __name__ == "__main__":
    main()
