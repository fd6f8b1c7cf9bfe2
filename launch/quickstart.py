"""`tiglon quickstart`: the whole story on this computer, told as the commands a reader would type.

Each step is a public command, printed before it runs. What is there already is not made again: a second quickstart
carries on where the first one stopped, or says that it is done.
"""

import os
import shlex
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from launch import runtime
from launch.config import RESOLVED, load
from launch.status import Status
from trainer.metrics import FILE_NAME, read_records
from trainer.progress import duration, plural
from trainer.restore import steps
from trainer.store import open_store

CONFIG = Path(__file__).parent / "configs" / "quickstart.toml"
HELD_OUT = 0.02
"""Share of the library's files kept for validation."""


@dataclass(frozen=True)
class Step:
    """One public command, and whether what it makes is there already."""

    what: str
    command: list[str]
    """As a reader would type it."""
    done: Callable[[], bool] = lambda: False
    ranks: int = 1


def quickstart_command(
    dir: Annotated[str, typer.Option(help="Everything is written here.")] = "runs/quickstart",
    steps: Annotated[int, typer.Option(help="Optimizer updates; 0 = as the configuration says.")] = 0,
) -> None:
    """From nothing to a small language model of Python source, on this computer, in minutes.

    Example: tiglon quickstart --dir runs/mine --steps 100
    """
    story = plan(Path(dir), steps)
    if all(step.done() for step in story):
        print(f"{dir} is done: {outcome(Path(dir))}")
        print(f"look at {dir}/report/report.html; to train longer: tiglon quickstart --dir {dir} --steps N")
        print(f"to start over, delete {dir}")
        return
    began = time.monotonic()
    for number, step in enumerate(story, start=1):
        tell(step, f"{number}/{len(story)}")
    print(f"\ndone in {duration(time.monotonic() - began)}: {outcome(Path(dir))}")
    print(f"plots: {dir}/report/   curves: tensorboard --logdir {dir}/tensorboard   records: {dir}/{FILE_NAME}")


def plan(directory: Path, updates: int = 0) -> list[Step]:
    """The steps of the story in `directory`; `updates` = 0 takes train.steps of the configuration."""
    text, tokenizer, corpus = directory / "text", directory / "tokenizer", directory / "corpus"
    overrides = changes(directory, updates)
    config = load(CONFIG, overrides)
    ranks = min(2, torch.cuda.device_count()) if torch.cuda.is_available() else 2  # one process a GPU
    launch = ["tiglon", "train", near(CONFIG), "--nproc", str(ranks), *overrides]
    vocabulary, workers = config.model.vocab_size, os.cpu_count() or 1
    report = directory / "report" / "report.html"

    def trained() -> bool:
        return last_step(directory) >= config.train.steps

    def told() -> bool:
        return trained() and is_newer(report, directory / FILE_NAME)

    return [
        Step(
            "collect Python's standard library",
            ["python", "-m", "launch.library", f"{text}/library.parquet"],
            (text / "library.parquet").is_file,
        ),
        Step(
            "train a tokenizer",
            ["tiglon", "tokenizer", "train", str(text), "--vocab-size", str(vocabulary), "--output", str(tokenizer)],
            (tokenizer / "tiglon_tokenizer.json").is_file,
        ),
        Step(
            "turn text into token shards",
            ["tiglon", "prepare", str(text), "--tokenizer", str(tokenizer), "--output", str(corpus),
             "--workers", str(workers), "--validation-fraction", str(HELD_OUT)],
            (corpus / "validation" / "manifest.json").is_file,
        ),
        Step("train", launch, trained, ranks),
        Step("evaluate", ["tiglon", "evaluate", str(directory)], told),
        Step("sample", ["tiglon", "generate", str(directory), "--prompt", "def ", "--tokens", "100"], told),
        Step("draw the report", ["tiglon", "report", str(directory)], told),
    ]  # fmt: skip


def changes(directory: Path, updates: int) -> list[str]:
    """What this run says otherwise than the shipped configuration."""
    written = load(CONFIG)
    overrides = []
    if directory != Path(written.run.dir):
        overrides += [
            f"run.dir={directory}",
            f"data.tokenizer={directory}/tokenizer",
            f"data.train={directory}/corpus/train",
            f"data.validation={directory}/corpus/validation",
        ]
    if updates:
        overrides.append(f"train.steps={updates}")
    precision = chosen_precision(directory)
    if precision != written.train.precision:
        overrides.append(f"train.precision={precision}")
    return overrides


def chosen_precision(directory: Path) -> str:
    """As the run was begun; else the faster one: many CPUs have no bf16 products and imitate them slowly."""
    begun = directory / "config.toml"
    if begun.is_file():
        values = tomllib.loads(begun.read_text())
        return values.get(RESOLVED, values)["train"]["precision"]
    if torch.cuda.is_available():
        return "bf16"
    return "fp32" if product_seconds(torch.bfloat16) > 1.2 * product_seconds(torch.float32) else "bf16"


def product_seconds(dtype: torch.dtype) -> float:
    """Processor time of a matrix product of the model's size: one thread and the best of many, so other work counts little."""
    a, b = torch.ones(2048, 256, dtype=dtype), torch.ones(256, 704, dtype=dtype)
    threads, best = torch.get_num_threads(), float("inf")
    torch.set_num_threads(1)  # threads that wait for one another are paid for
    for _ in range(30):
        began = time.process_time()
        torch.mm(a, b)
        best = min(best, time.process_time() - began)
    torch.set_num_threads(threads)
    return best


def tell(step: Step, number: str) -> None:
    """Print the command, then run it, unless its work is done.

    Raises:
        typer.Exit: with the command's status when it fails; 130 when interrupted.
    """
    print(f"\n[{number}] {step.what}", flush=True)
    if step.done():
        print("      done already", flush=True)
        return
    print(f"$ {shlex.join(step.command)}", flush=True)
    environment = runtime.rank_environment(step.ranks)
    running = subprocess.Popen(executable(step.command), env=environment)
    try:
        status = running.wait()
    except KeyboardInterrupt:
        _wait_for(running)
        print("\ninterrupted; run tiglon quickstart again to carry on", file=sys.stderr)
        raise typer.Exit(Status.INTERRUPTED) from None
    if status == Status.STOPPED:
        print("stopped and saved; run tiglon quickstart again to go on", file=sys.stderr)
        raise typer.Exit(status)
    if status:
        print(f"tiglon: '{step.what}' ended with status {status}; mend it and run tiglon quickstart again", file=sys.stderr)
        print("finished steps are not repeated", file=sys.stderr)
        raise typer.Exit(status if status > 0 else 128 - status)


def _wait_for(running: subprocess.Popen) -> None:
    """Ctrl-C reaches the step too, and it may be saving: it ends by itself, or by a second Ctrl-C."""
    try:
        running.wait()
    except KeyboardInterrupt:
        running.kill()
        running.wait()


def executable(command: list[str]) -> list[str]:
    """The same command through the running Python, whatever PATH says."""
    match command:
        case ["tiglon", *rest]:
            return [sys.executable, "-m", "launch", *rest]
        case ["python", *rest]:
            return [sys.executable, *rest]
        case _:
            raise ValueError(f"a step starts with tiglon or python, got {command[0]}")


def near(path: Path) -> str:
    """A path as one would type it from here."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def last_step(directory: Path) -> int:
    """Step of the newest checkpoint, 0 = none."""
    place = directory / "checkpoints"
    return max(steps(open_store(str(place))), default=0) if place.is_dir() else 0


def is_newer(path: Path, than: Path) -> bool:
    """Whether a file is there and not older than another."""
    return path.is_file() and (not than.is_file() or path.stat().st_mtime >= than.stat().st_mtime)


def outcome(directory: Path) -> str:
    """One line: how far and how well."""
    records = read_records(directory / FILE_NAME)
    train = [record for record in records if record["kind"] == "train"]
    held_out = [record for record in records if record["kind"] == "evaluate"]
    if not train:
        return "no training step yet"
    said = f"{plural(train[-1]['step'], 'step')}, training loss {train[0]['loss']:.2f} -> {train[-1]['loss']:.2f}"
    return f"{said}, validation loss {held_out[-1]['loss']:.2f}" if held_out else said
