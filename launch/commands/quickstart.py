"""`tiglon quickstart`: from text to a report on this computer, as the public commands that a user would type.

Each step is printed before it runs. Finished steps are not repeated: a second quickstart resumes where the first one
stopped, or says that all is done.
"""

import os
import shlex
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer

from data.storage import open_store
from launch import runtime
from launch.config import RESOLVED, RunConfig
from launch.exit_status import Status
from launch.interrupts import interrupts_held
from launch.load_config import load_config
from trainer.checkpoint.directory import saved_steps
from trainer.monitoring.progress import format_duration, plural
from trainer.monitoring.records import FILE_NAME, read_records


class QuickstartConfig(StrEnum):
    """The shipped configurations that train on the text of this command."""

    quickstart = "quickstart"
    quickstart_moe = "quickstart-moe"


HELD_OUT = 0.02
"""Share of the library's files held out for validation."""


@dataclass(frozen=True)
class QuickstartStep:
    """One public command, and whether its output is there already."""

    title: str
    command: list[str]
    """As a user would type it."""
    done: Callable[[], bool] = lambda: False
    ranks: int = 1


def quickstart_command(
    dir: Annotated[
        str, typer.Option(help="Directory for everything it writes.", show_default="run.dir of the configuration")
    ] = "",
    steps: Annotated[int, typer.Option(help="Optimizer updates; 0 = as the configuration says.")] = 0,
    config: Annotated[
        QuickstartConfig, typer.Option(help="What to train; quickstart-moe is a mixture of experts.")
    ] = QuickstartConfig.quickstart,
) -> None:
    """Train a small language model of Python source from scratch, on this computer, in minutes.

    Example: tiglon quickstart --dir runs/mine --steps 100
    """
    directory = Path(dir or load_config(config).run.dir)
    plan = quickstart_steps(directory, steps, config)
    if all(step.done() for step in plan):
        again = "tiglon quickstart" + (f" --config {config}" if config != QuickstartConfig.quickstart else "")
        print(f"{directory} is done: {outcome(directory)}")
        print(f"report: {directory}/report/report.html; to train longer: {again} --dir {directory} --steps N")
        print(f"to start over, delete {directory}")
        return
    began = time.monotonic()
    for number, step in enumerate(plan, start=1):
        run_step(step, f"{number}/{len(plan)}")
    print(f"\ndone in {format_duration(time.monotonic() - began)}: {outcome(directory)}")
    print(
        f"plots: {directory}/report/   curves: tensorboard --logdir {directory}/tensorboard   records: {directory}/{FILE_NAME}"
    )


def quickstart_steps(
    directory: Path, updates: int = 0, name: QuickstartConfig = QuickstartConfig.quickstart
) -> list[QuickstartStep]:
    """The steps, all in `directory`, except that text and tokenizer are where the configuration says if `directory` is its own.

    Args:
        updates: 0 takes train.steps of the configuration.
    """
    overrides = quickstart_overrides(directory, updates, name)
    config = load_config(name, overrides)
    ranks = min(2, torch.cuda.device_count()) if torch.cuda.is_available() else 2  # one process per GPU
    train = ["tiglon", "train", name.value, "--nproc", str(ranks), *overrides]
    report = directory / "report" / "report.html"

    def trained() -> bool:
        return last_step(directory) >= config.train.steps

    def reported() -> bool:
        return trained() and is_newer(report, directory / FILE_NAME)

    return [
        *_data_steps(config),
        QuickstartStep("train", train, trained, ranks),
        QuickstartStep("evaluate", ["tiglon", "evaluate", str(directory)], reported),
        QuickstartStep("sample", ["tiglon", "generate", str(directory), "--prompt", "def ", "--tokens", "100"], reported),
        QuickstartStep("plot the report", ["tiglon", "report", str(directory)], reported),
    ]


def _data_steps(config: RunConfig) -> list[QuickstartStep]:
    """From text to shards, where the configuration reads them."""
    tokenizer, corpus = Path(config.data.tokenizer), Path(str(config.data.validation)).parent
    text, workers, vocabulary = tokenizer.parent / "text", os.cpu_count() or 1, config.model.vocab_size
    return [
        QuickstartStep(
            "collect Python's standard library",
            ["python", "-m", "launch.standard_library", f"{text}/library.parquet"],
            (text / "library.parquet").is_file,
        ),
        QuickstartStep(
            "train a tokenizer",
            ["tiglon", "tokenizer", "train", str(text), "--vocab-size", str(vocabulary), "--output", str(tokenizer)],
            (tokenizer / "tiglon_tokenizer.json").is_file,
        ),
        QuickstartStep(
            "tokenize the text into shards",
            ["tiglon", "prepare", str(text), "--tokenizer", str(tokenizer), "--output", str(corpus),
             "--workers", str(workers), "--validation-fraction", str(HELD_OUT)],
            (corpus / "validation" / "manifest.json").is_file,
        ),
    ]  # fmt: skip


def quickstart_overrides(directory: Path, updates: int, name: QuickstartConfig) -> list[str]:
    """What differs from the shipped configuration in this directory and on this computer."""
    shipped = load_config(name)
    overrides = []
    if directory != Path(shipped.run.dir):
        overrides += [
            f"run.dir={directory}",
            f"data.tokenizer={directory}/tokenizer",
            f"data.train={directory}/corpus/train",
            f"data.validation={directory}/corpus/validation",
        ]
    if updates:
        overrides.append(f"train.steps={updates}")
    precision = chosen_precision(directory)
    if precision != shipped.train.precision:
        overrides.append(f"train.precision={precision}")
    return overrides


def chosen_precision(directory: Path) -> str:
    """As the run was begun, else the faster one: many CPUs have no bf16 instructions and emulate them slowly."""
    begun = directory / "config.toml"
    if begun.is_file():
        values = tomllib.loads(begun.read_text(encoding="utf-8"))
        return values.get(RESOLVED, values)["train"]["precision"]
    if torch.cuda.is_available():
        return "bf16"
    return "fp32" if matmul_seconds(torch.bfloat16) > 1.2 * matmul_seconds(torch.float32) else "bf16"


def matmul_seconds(dtype: torch.dtype) -> float:
    """CPU time of a matrix product of the model's size: one thread and the best of 30, so that other load counts little."""
    a, b = torch.ones(2048, 256, dtype=dtype), torch.ones(256, 704, dtype=dtype)
    threads, best = torch.get_num_threads(), float("inf")
    torch.set_num_threads(1)  # process_time counts threads that spin while they wait for one another
    for _ in range(30):
        began = time.process_time()
        torch.mm(a, b)
        best = min(best, time.process_time() - began)
    torch.set_num_threads(threads)
    return best


def run_step(step: QuickstartStep, number: str) -> None:
    """Print a step's command and run it, unless it is done.

    Raises:
        typer.Exit: with the command's status when it fails; 130 when interrupted.
    """
    print(f"\n[{number}] {step.title}", flush=True)
    if step.done():
        print("      done already", flush=True)
        return
    print(f"$ {shlex.join(step.command)}", flush=True)
    with interrupts_held() if step.command[0] == "tiglon" else nullcontext():
        process = subprocess.Popen(executable(step.command), env=runtime.rank_environment(step.ranks))
    try:
        status = process.wait()
    except KeyboardInterrupt:
        _wait_after_interrupt(process)
        print("\ninterrupted; run tiglon quickstart again to resume", file=sys.stderr)
        raise typer.Exit(Status.INTERRUPTED) from None
    if status == Status.STOPPED:
        print("stopped and saved; run tiglon quickstart again to resume", file=sys.stderr)
        raise typer.Exit(status)
    if status:
        print(f"tiglon: '{step.title}' ended with status {status}; fix it and run tiglon quickstart again", file=sys.stderr)
        print("finished steps are not repeated", file=sys.stderr)
        raise typer.Exit(status if status > 0 else 128 - status)


def _wait_after_interrupt(process: subprocess.Popen) -> None:
    """Let the step end by itself, since it got the Ctrl-C too and may be saving; a second Ctrl-C kills it."""
    try:
        process.wait()
    except KeyboardInterrupt:
        process.kill()
        process.wait()


def executable(command: list[str]) -> list[str]:
    """The same command with the Python that runs this program, whatever is on PATH."""
    match command:
        case ["tiglon", *rest]:
            return [sys.executable, "-m", "launch", *rest]
        case ["python", *rest]:
            return [sys.executable, *rest]
        case _:
            raise ValueError(f"a step starts with tiglon or python, got {command[0]}")


def last_step(directory: Path) -> int:
    """Step of the newest checkpoint; 0 = none."""
    checkpoints = directory / "checkpoints"
    return max(saved_steps(open_store(str(checkpoints))), default=0) if checkpoints.is_dir() else 0


def is_newer(path: Path, than: Path) -> bool:
    """Whether a file exists and is not older than another (which may be missing)."""
    return path.is_file() and (not than.is_file() or path.stat().st_mtime >= than.stat().st_mtime)


def outcome(directory: Path) -> str:
    """One line: steps and losses so far."""
    records = read_records(directory / FILE_NAME)
    train = [record for record in records if record["kind"] == "train"]
    held_out = [record for record in records if record["kind"] == "evaluate"]
    if not train:
        return "no training step yet"
    summary = f"{plural(train[-1]['step'], 'step')}, training loss {train[0]['loss']:.2f} -> {train[-1]['loss']:.2f}"
    return f"{summary}, validation loss {held_out[-1]['loss']:.2f}" if held_out else summary
