"""What a checkpoint costs: stall of a save, bytes against the least, speed against dd, memory.

    python -m benchmarks.checkpoint [--folder DIR] [--rounds 3] [--only NAME] [--output docs/results/checkpoint_speed.md]

One process, real tensor names and shapes: a 0.1-billion-parameter network under AdamW (float32 weights and two states,
12 bytes per parameter) and a 1-billion-parameter one under Tiger's fold engine (bfloat16 weights and momentum, 4 bytes).
dd copies the very file that was saved, to and from the same disk, before and after ours by turns; reads start with the file
dropped from the page cache.

An asynchronous save stalls a run until `save` returns, before the next backward until fold's momentum is copied, and before
the next update until all is. Between them stands matrix multiplication, a third of two seconds for the forward, the rest for
the backward. A real network of these sizes takes longer on this hardware, which would only hide more.
"""

import argparse
import ctypes
import math
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch

from data.storage import open_store
from launch.checkpoints import load_checkpoint
from model.config import ModelConfig
from model.sizes import full_shapes
from trainer.checkpoint.api import CheckpointMeta, Checkpoints, Shard
from trainer.checkpoint.rectangles import StepPart
from trainer.config import CheckpointConfig

STATES: dict[str, tuple[dict[str, int], torch.dtype, dict[str, StepPart]]] = {
    "0.1 billion, AdamW": (
        {"hidden_size": 640, "intermediate_size": 1792, "num_hidden_layers": 16, "num_attention_heads": 10},
        torch.float32,
        {"weight": "update", "momentum": "update", "second_moment": "update"},
    ),
    "1 billion, Tiger fold": (
        {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 18, "num_attention_heads": 16},
        torch.bfloat16,
        {"weight": "update", "momentum": "accumulate"},
    ),
}
"""Name -> (sizes, number format, what is saved of each parameter and the part of a step that changes it, as in Shard)."""

WORK_SECONDS = 2.0


@dataclass
class Measured:
    """Seconds of each round, and sizes in bytes."""

    parameters: int = 0
    state: int = 0
    stored: int = 0
    synchronous: list[float] = field(default_factory=list)
    first: float = math.nan
    stall: list[float] = field(default_factory=list)
    work: list[float] = field(default_factory=list)
    work_beside: list[float] = field(default_factory=list)
    behind: list[float] = field(default_factory=list)
    load: list[float] = field(default_factory=list)
    dd_write: list[float] = field(default_factory=list)
    dd_read: list[float] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)


def make_state(sizes: dict[str, int], dtype: torch.dtype, kinds: dict[str, StepPart]) -> list[Shard]:
    """Shards of a whole network in one process, filled with numbers that do not compress."""
    config = ModelConfig.model_validate({"vocab_size": 32000, **sizes})
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1 << 20, generator=generator).to(dtype)
    found = []
    for kind, changes_in in kinds.items():
        for name, shape in full_shapes(config).items():
            size = math.prod(shape)
            values = noise.repeat(-(-size // len(noise)))[:size].clone()
            found.append(Shard(f"{kind}/{name}", shape, shape, (0,) * len(shape), 0, values, changes_in=changes_in))
    return found


def make_work() -> Callable[[], None]:
    """A forward's work: matrix multiplication for a third of WORK_SECONDS on this machine when nothing else runs."""
    a, b, out = (torch.randn(1024, 1024) for _ in range(3))

    def multiply(times: int) -> None:
        for _ in range(times):
            torch.matmul(a, b, out=out)

    multiply(3)
    times = math.ceil(WORK_SECONDS / 3 / (timed(lambda: multiply(10)) / 10))
    return lambda: multiply(times)


def timed(action: Callable[[], object]) -> float:
    """Seconds of wall clock."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def drop(path: Path) -> None:
    """Put a file out of the page cache."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def dd(source: str, target: str, *options: str) -> float:
    """Seconds of dd in blocks of 16 MiB."""
    command = ["dd", f"if={source}", f"of={target}", "bs=16M", *options]
    return timed(lambda: subprocess.run(command, check=True, stderr=subprocess.DEVNULL))


def peak_above(action: Callable[[], object]) -> int:
    """Bytes by which an action raises the resident memory of this process at its highest."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    action()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def measure(folder: Path, state: list[Shard], rounds: int) -> Measured:
    """All figures of one state."""
    found = Measured()
    found.state = sum(shard.values.numel() * shard.values.itemsize for shard in state)
    found.parameters = sum(shard.values.numel() for shard in state if shard.name.startswith("weight/"))
    keep = {"keep": 1, "resume": "never"}
    made = folder / "step-00000001"
    file = made / "rank-00000.safetensors"
    now = Checkpoints(open_store, str(folder), CheckpointConfig(asynchronous=False, **keep), None, print)
    found.memory["synchronous save"] = peak_above(lambda: now.save(state, CheckpointMeta(1, 0)))
    found.stored = sum(path.stat().st_size for path in made.iterdir())

    def dd_write() -> None:
        found.dd_write.append(dd(str(file), str(folder / "copy"), "conv=fsync"))
        (folder / "copy").unlink()

    def dd_read() -> None:
        drop(file)
        found.dd_read.append(dd(str(file), "/dev/null"))

    def load_cold() -> None:
        drop(file)
        found.load.append(timed(lambda: load_checkpoint(made, state)))

    pairs = [
        (dd_read, load_cold),
        (dd_write, lambda: found.synchronous.append(timed(lambda: now.save(state, CheckpointMeta(1, 0))))),
    ]
    for number in range(rounds):  # by turns: who writes first pays for the memory that a virtual machine has lent away
        for pair in pairs:
            for action in pair if number % 2 else pair[::-1]:
                action()
    found.memory["load"] = peak_above(lambda: load_checkpoint(made, state))
    now.close()
    behind = Checkpoints(open_store, str(folder), CheckpointConfig(asynchronous=True, **keep), None, print)
    forward = make_work()

    def first() -> None:
        """A run's memory for copies is taken at its start, and its first save comes after some steps."""
        behind.reserve(state)
        for _ in range(9):
            forward()
        asynchronous(behind, state, forward, found)

    found.memory["asynchronous save"] = peak_above(first)
    found.first = found.stall.pop()
    found.work_beside.clear()
    found.behind.clear()
    for _ in range(rounds):
        found.work.append(sum(timed(forward) for _ in range(3)))
        asynchronous(behind, state, forward, found)
    behind.close()
    return found


def asynchronous(kept: Checkpoints, state: list[Shard], forward: Callable[[], None], found: Measured) -> None:
    """One save with a step's work beside it, to its end."""
    began = time.perf_counter()
    stall = timed(lambda: kept.save(state, CheckpointMeta(1, 0)))
    beside = timed(forward)
    stall += timed(lambda: kept.wait_for_copy("accumulate"))
    found.work_beside.append(beside + timed(forward) + timed(forward))  # a backward is two forwards
    found.stall.append(stall + timed(lambda: kept.wait_for_copy("update")))
    kept.wait()
    found.behind.append(time.perf_counter() - began)


def page(results: dict[str, Measured], rounds: int, command: str) -> str:
    """The results as Markdown."""
    columns = list(results)
    rows: list[tuple[str, list[str]]] = []

    def row(name: str, value: Callable[[Measured], str]) -> None:
        rows.append((name, [value(results[column]) for column in columns]))

    row("parameters", lambda m: f"{m.parameters / 1e9:.3f} billion")
    row("state", lambda m: f"{m.state / 1e9:.2f} GB")
    row("written, above the least", lambda m: f"{m.stored / m.state - 1:+.4%}")

    def speed(name: str, times: Callable[[Measured], list[float]]) -> None:
        row(
            name,
            lambda m: f"{min(times(m)):.2f} s, {m.state / min(times(m)) / 1e9:.2f} GB/s (median {median(times(m)):.2f} s)",
        )

    speed("synchronous save", lambda m: m.synchronous)
    speed("dd of the same bytes, fsync", lambda m: m.dd_write)
    row("save against dd", lambda m: f"{min(m.dd_write) / min(m.synchronous):.0%}")
    row("the same, medians", lambda m: f"{median(m.dd_write) / median(m.synchronous):.0%}")
    row(
        "stall of an asynchronous save",
        lambda m: f"{min(m.stall):.3f} s (median {median(m.stall):.3f} s, the first {m.first:.2f} s)",
    )
    row("stall against a synchronous save", lambda m: f"{min(m.stall) / min(m.synchronous):.1%}")
    row("the same, medians", lambda m: f"{median(m.stall) / median(m.synchronous):.1%}")
    row("a step's work beside it, against alone", lambda m: f"{median(m.work_beside):.2f} s, {median(m.work):.2f} s")
    row("asynchronous save until complete", lambda m: f"{min(m.behind):.2f} s")
    speed("load, cold", lambda m: m.load)
    speed("dd to /dev/null, cold", lambda m: m.dd_read)
    row("load against dd", lambda m: f"{min(m.dd_read) / min(m.load):.0%}")
    row("the same, medians", lambda m: f"{median(m.dd_read) / median(m.load):.0%}")
    for kind in ("synchronous save", "asynchronous save", "load"):
        row(f"memory above the state, {kind}", lambda m, kind=kind: f"{m.memory[kind] / 1e6:.0f} MB")
    head = ["# What a checkpoint costs", "", f"    {command}", ""]
    load_average = "/".join(f"{value:.0f}" for value in os.getloadavg())
    head += [f"Best of {rounds} rounds; {os.cpu_count()} cores, torch {torch.__version__}, one process, one thread;"]
    head += [f"load average of the machine at the end: {load_average}.", ""]
    table = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    table += [f"| {name} | " + " | ".join(values) + " |" for name, values in rows]
    return "\n".join([*head, *table]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/checkpoint-benchmark"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="a state whose name begins so")
    parser.add_argument("--output", type=Path, default=Path("docs/results/checkpoint_speed.md"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for name, description in STATES.items():
        if name.startswith(options.only):
            shutil.rmtree(options.folder, ignore_errors=True)
            results[name] = measure(options.folder, make_state(*description), options.rounds)
    shutil.rmtree(options.folder, ignore_errors=True)
    only = f" --only '{options.only}'" if options.only else ""
    text = page(results, options.rounds, f"python -m benchmarks.checkpoint --rounds {options.rounds}{only}")
    print(text)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(text)


if __name__ == "__main__":
    main()
