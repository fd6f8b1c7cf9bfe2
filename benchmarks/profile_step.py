"""Where the time of tiglon's training step goes, by class of work.

    python -m benchmarks.profile_step [--shape 8m|30m|...] [--length N] [--compile] [--engine zero|fold] [--steps K] [--top N]

Self time of every operation under torch's profiler, given to a class by where it runs (loss, optimizer) or by its name.
The profiler itself slows small operations down; the line "step" is the time of a step without it. With --json, the shares.

    python -m benchmarks.profile_step --page docs/results

writes profile.md: four shapes as shipped, compiled and not, beside the same step with what was measured for speed taken
back (--before: the loss in one piece, torch's own attention), each in a process of its own.
"""

import argparse
import json
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch._inductor import config as inductor
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.contestants import SHAPES
from benchmarks.peers.tiglon import Batch, started
from launch.engine import make_engine
from launch.load_config import build_config
from model import loss
from model.attention.kernels.dispatch import BACKENDS
from model.parallel.mesh import make_mesh

CLASSES = {
    "communication": ("allreduce", "all_reduce", "gloo:", "nccl", "c10d::", "all_gather", "reduce_scatter", "broadcast_"),
    "attention": ("attention", "tiglon::"),
    "matrix products": ("mkldnn", "::mm", "::addmm", "::bmm", "::baddbmm", "::linear", "gemm", "::matmul"),
}
"""Parts of an operation's name; everything else is pointwise work."""
PAGE = [("quickstart", 256, 0), ("8m", 512, 0), ("30m", 512, 0), ("125m", 1024, 4096)]
"""Shape, length and tokens a step (0 = the shape's own) of the profile page."""
WAYS = {"before": ["--before"], "shipped": [], "shipped, compiled": ["--compile"]}
KERNELS = {
    "communication": ("nccl",),
    "attention": ("sdpa", "flash", "fmha", "dot_do_o", "attention"),
    "matrix products": ("nvjet", "gemm", "cutlass", "xmma", "cublas", "gemv", "splitk"),
    "compiled": ("triton_",),
    "copies": ("memcpy", "memset", "copy_kernel", "catarray"),
}
"""Parts of a GPU kernel's name; everything else is pointwise work."""
REGIONS = {"loss": ("in loss", "_CrossEntropy"), "optimizer": ("in optimizer",), "data": ("in data",)}


def class_of(event: Any) -> str:
    """The class of a profiled operation: by its own name or that of an operation it is part of; regions come first."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    for kind, marks in [*REGIONS.items(), *CLASSES.items()]:
        if any(mark in name for mark in marks for name in names):
            return kind
    return "pointwise"


def steps_of(given: argparse.Namespace) -> Any:
    """A function that trains one step, with its regions marked."""
    device = started(given.device)
    if given.before:
        loss.CHUNKS[device.type] = loss.ChunkLimits(1 << 40, 1 << 40, 1)
        BACKENDS["cpu_dense"] = replace(BACKENDS["cpu_dense"], max_tokens=0)
    shape = SHAPES[given.shape]
    batch = max(1, (given.tokens or shape.tokens) // given.length)
    config = build_config({
        "model": shape.model(),
        "optimizer": {"name": "tiger" if given.engine == "fold" else "adamw"},
        "train": {
            "sequence_length": given.length, "micro_batch_size": batch, "global_batch_size": batch, "precision": "bf16",
            "compile": given.compile,
        },
        "parallel": {"engine": given.engine},
    })  # fmt: skip
    engine = make_engine(config, make_mesh(1, device))
    head = engine.model.head
    forward = head.forward

    def marked(*arguments: Any) -> Any:
        with record_function("in loss"):
            return forward(*arguments)

    head.forward = marked
    ids = torch.randint(shape.vocab_size, (batch, given.length + 1), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        with record_function("in data"):
            inputs, targets = ids[:, :-1].to(device), ids[:, 1:].to(device)
        engine.accumulate([Batch(inputs, targets)])
        with record_function("in optimizer"):
            engine.update(1e-4)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step, device


def measure(given: argparse.Namespace) -> tuple[dict[str, float], list[tuple[str, str, float, int]], float]:
    """Seconds a step by class; the dearest operations (name, class, seconds, calls); seconds of a step without profiler."""
    step, device = steps_of(given)
    for _ in range(3):
        step()
    begin = time.perf_counter()
    for _ in range(given.steps):
        step()
    plain = (time.perf_counter() - begin) / given.steps
    classes, dearest = profiled(step, given.steps, device)
    if device.type == "cuda":
        classes["idle"] = max(0.0, plain - sum(classes.values()))
    return classes, dearest[: given.top], plain


def profiled(
    step: Callable[[], object], steps: int, device: torch.device
) -> tuple[dict[str, float], list[tuple[str, str, float, int]]]:
    """Seconds a step by class, and every operation (name, class, seconds, calls), the dearest first.

    On a GPU its kernels are what is counted, by their names; on a CPU operations, by where they run.
    """
    gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as found:
        for _ in range(steps):
            step()
        if gpu:
            torch.cuda.synchronize()
    classes: dict[str, float] = defaultdict(float)
    operations: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0])
    for event in found.events() or []:
        if gpu and (event.device_type != torch.autograd.DeviceType.CUDA or event.name.startswith(("ProfilerStep", "## "))):
            continue
        own, kind = (
            (event.self_device_time_total, kernel_class(event.name)) if gpu else (event.self_cpu_time_total, class_of(event))
        )
        classes[kind] += own / 1e6 / steps
        operations[event.name, kind][0] += own / 1e6 / steps
        operations[event.name, kind][1] += 1
    dearest = sorted(((name, kind, value[0], int(value[1])) for (name, kind), value in operations.items()), key=lambda x: -x[2])
    return dict(classes), dearest


def kernel_class(name: str) -> str:
    """The class of a GPU's kernel by its name."""
    return next((kind for kind, marks in KERNELS.items() if any(mark in name.lower() for mark in marks)), "pointwise")


def page(output: Path, shapes: list[tuple[str, int, int]], steps: int) -> None:
    """Measure every shape in every way and write profile.md and profile.json."""
    kept = output / "profile.json"
    found: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    for shape, length, tokens in shapes:
        for way, options in WAYS.items():
            written = output / "profile.tmp"
            command = [sys.executable, "-m", "benchmarks.profile_step", "--shape", shape, "--length", str(length)]
            command += ["--tokens", str(tokens), "--steps", str(steps), "--json", str(written), *options]
            subprocess.run(command, check=True)
            found.setdefault(f"{shape}, length {length}", {})[way] = json.loads(written.read_text())
            written.unlink()
        kept.write_text(json.dumps(found, indent=1) + "\n")
    (output / "profile.md").write_text("\n".join(_page_lines(found)) + "\n")


def _page_lines(found: dict[str, Any]) -> list[str]:
    lines = [
        "# Where the time of a step goes", "",
        "`python -m benchmarks.profile_step --page docs/results`: milliseconds of a step by class, bfloat16, AdamW, on "
        f"{torch.get_num_threads()} CPU threads. *Before* is that step with the loss in one piece and torch's own attention. "
        "Compiled loops count as pointwise work. The classes are self times under the profiler, which slows small operations "
        "down; the step is timed without it, and without the allocator's settings of ranks that tiglon starts.", "",
    ]  # fmt: skip
    for name, ways in found.items():
        kinds = sorted({kind for way in ways.values() for kind in way["seconds"]}, key=lambda kind: -_most(ways, kind))
        lines += [f"## {name}", "", "| | step, ms | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 2) + "|"]
        for way, result in ways.items():
            parts = [f"{1e3 * result['seconds'].get(kind, 0.0):,.0f} ({result['shares'].get(kind, 0.0):.0%})" for kind in kinds]
            lines.append(f"| {way} | {1e3 * result['step_seconds']:,.0f} | " + " | ".join(parts) + " |")
        lines.append("")
    return lines[:-1]


def _most(ways: dict[str, Any], kind: str) -> float:
    return max(way["seconds"].get(kind, 0.0) for way in ways.values())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="8m")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--engine", choices=["zero", "fold"], default="zero")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--top", type=int, default=15, help="operations listed by themselves")
    parser.add_argument("--tokens", type=int, default=0, help="of a step (default: by shape)")
    parser.add_argument("--before", action="store_true", help="without what was done for speed")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", type=Path, help="folder of the page of all shapes")
    given = parser.parse_args()
    if given.page:
        return page(given.page, PAGE, given.steps)
    if given.compile:
        inductor.cpp.enable_kernel_profile = True  # else fused loops run without a name
    classes, dearest, plain = measure(given)
    say, total = Console(width=140), sum(classes.values())
    shown = Table("class", "ms a step", "share", title=f"{given.shape}, length {given.length}, step {plain * 1e3:.0f} ms")
    for name, seconds in sorted(classes.items(), key=lambda item: -item[1]):
        shown.add_row(name, f"{seconds * 1e3:.1f}", f"{seconds / total:.0%}")
    say.print(shown)
    listed = Table("operation", "class", "ms a step", "calls")
    for name, kind, seconds, calls in dearest:
        listed.add_row(name[:80], kind, f"{seconds * 1e3:.1f}", f"{calls / given.steps:g}")
    say.print(listed)
    if given.json:
        result = {"shape": given.shape, "length": given.length, "compile": given.compile, "engine": given.engine}
        shares = {name: seconds / total for name, seconds in classes.items()}
        given.json.write_text(
            json.dumps(result | {"step_seconds": plain, "seconds": classes, "shares": shares}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
