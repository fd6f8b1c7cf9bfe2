"""How the data benchmarks write down what they measured."""

import os
import platform
from importlib.metadata import version
from pathlib import Path


def write_table(output: str, title: str, command: str, note: str, rows: list[tuple[str, str]]) -> None:
    """Print a table of (what, measured) and, when `output` names a file, write it as Markdown with the command above it."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("sentencepiece", "pyarrow", "numpy", "torch"))
    lines = [
        f"# {title}", "", f"    {command}", "", note, "",
        f"{platform.machine()}, {_cores()} cores, Python {platform.python_version()}, {packages}.", "",
        "| what | measured |", "|---|---|", *(f"| {what} | {measured} |" for what, measured in rows),
    ]  # fmt: skip
    text = "\n".join(lines) + "\n"
    print(text)
    if output:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).write_text(text)


def peak_memory() -> int:
    """Most resident memory of this process so far (bytes). Linux: rusage would count what the parent held before exec."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status: run the data benchmarks on Linux")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
