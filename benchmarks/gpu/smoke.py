"""The user's own commands on a small corpus: every engine trains, resumes bit for bit, evaluates and samples."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.figures import Part
from launch.checkpoints import read_tensor, tensor_names
from tests.combinations import corpus

TIGER = ("optimizer.name=tiger", "optimizer.tiger.learning_rate=2e-3", "optimizer.tiger.beta=0.9")
COMPILED = "train.compile=true"
WAYS: dict[str, tuple[str, ...]] = {
    "ZeRO 1, AdamW": (
        "parallel.zero_stage=1", "optimizer.name=adamw",
    ),
    "ZeRO 2, two micro-batches": ("parallel.zero_stage=2", "train.micro_batch_size=2", *TIGER),
    "ZeRO 3": ("parallel.zero_stage=3", *TIGER),
    "fold": ("parallel.engine=fold", *TIGER),
    "fold, compiled, Leaky ReRoPE": (
        "parallel.engine=fold", COMPILED, "position.kind=leaky-rerope", "position.window=64", "position.leak=4.0", *TIGER,
    ),
    "ZeRO 1, compiled, MLA": (
        "parallel.zero_stage=1", COMPILED, "model.attention=mla", "model.kv_lora_rank=64", "model.qk_nope_head_dim=32",
        "model.qk_rope_head_dim=32", "model.v_head_dim=32", *TIGER,
    ),
}  # fmt: skip
"""Overrides of the shipped quickstart configuration."""


def measure(part: Part) -> None:
    """All runs at the same time: correctness needs cores, not an idle GPU."""
    folder = part.scratch
    corpus.make(folder)
    ways = dict(list(WAYS.items())[3:4]) if part.tiny else WAYS
    steps = 4 if part.tiny else 20
    # Halves with a resume in between, and the whole at once, deterministic: the weights at the end are compared.
    runs = {(name, kind): folder / f"{number}-{kind}" for number, name in enumerate(ways) for kind in ("halves", "whole")}
    ended = _together(part, ways, runs, {kind: steps // 2 if kind == "halves" else steps for _, kind in runs})
    again = {run: path for run, path in runs.items() if run[1] == "halves"}
    resumed = _together(part, ways, again, {"halves": steps})
    for name in ways:
        part.attempt("run", lambda name=name: judged(name, runs, ended, resumed, steps), name=name)
    asked = runs[next(iter(ways)), "whole"]
    for name, arguments in {
        "evaluate": ["evaluate", str(asked)],
        "generate": ["generate", str(asked), "--prompt", "def ", "--tokens", "16"],
    }.items():
        part.attempt("command", lambda a=arguments: _command(a), name=name)


def _together(
    part: Part, ways: dict[str, tuple[str, ...]], runs: dict[tuple[str, str], Path], steps: dict[str, int]
) -> dict[tuple[str, str], tuple[int, str, float]]:
    """Status, screen and seconds of every run, all of them started at once."""
    begin, processes = time.monotonic(), {}
    for (name, kind), directory in runs.items():
        command = [sys.executable, "-m", "launch.train", "launch/configs/quickstart.toml"]
        command += _overrides(part, directory, steps[kind]) + list(ways[name])
        processes[name, kind] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if part.tiny:
            processes[name, kind].wait()  # two cores
    found = {}
    for run, process in processes.items():
        text = process.communicate()[0]
        print(f"--- {run}\n{text}", flush=True)
        found[run] = process.returncode, text, time.monotonic() - begin
        log = runs[run] / "logs/rank-0.log"
        if process.returncode and log.exists():
            print(log.read_text()[-6000:], flush=True)
    return found


def _overrides(part: Part, directory: Path, steps: int) -> list[str]:
    shards = directory.parent
    return [
        f"run.dir={directory}", f"run.device={part.device.type}", "run.deterministic=true",
        f"data.tokenizer={shards}/tokenizer", f"data.train={shards}/shards/train",
        f"data.validation={shards}/held-out/train", "model.vocab_size=512",
        "train.global_batch_size=4", "train.micro_batch_size=4", f"train.steps={steps}", "checkpoint.every_steps=5",
        "evaluate.every_steps=10", "evaluate.tokens=2048", "log.every_steps=1", "log.sample_tokens=8",
        "schedule.decay_steps=1000",
    ]  # fmt: skip


def judged(
    name: str,
    runs: dict[tuple[str, str], Path],
    ended: dict[tuple[str, str], tuple[int, str, float]],
    resumed: dict[tuple[str, str], tuple[int, str, float]],
    steps: int,
) -> dict[str, Any]:
    """Whether a way trained, learned, and resumed to the bits of an unbroken run; "error" says which of these failed."""
    results = (ended[name, "halves"], ended[name, "whole"], resumed[name, "halves"])
    for status, text, _ in results:
        if status:
            raise RuntimeError(" | ".join(text.strip().splitlines()[-2:])[-280:] or f"a run without a word, status {status}")
    losses = [_losses(runs[name, kind]) for kind in ("halves", "whole")]
    checkpoints = [runs[name, kind] / f"checkpoints/step-{steps:08d}" for kind in ("halves", "whole")]
    same = all(read_tensor(checkpoints[0], key).equal(read_tensor(checkpoints[1], key)) for key in tensor_names(checkpoints[1]))
    if "resumed from" not in results[2][1]:
        raise RuntimeError("the second half did not resume")
    found = {
        "first_loss": losses[1][1], "last_loss": losses[1][steps], "same_bits": same and losses[0] == losses[1],
        "seconds": round(results[1][2], 1),
    }  # fmt: skip
    if not found["same_bits"]:
        return found | {"error": "resumed, it has other bits than the run that nothing interrupted"}
    if not found["last_loss"] < found["first_loss"]:
        return found | {"error": f"the loss went from {found['first_loss']:.4f} to {found['last_loss']:.4f}"}
    return found


def _losses(directory: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records if record["kind"] == "train"}


def _command(arguments: list[str]) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-m", "launch", *arguments], capture_output=True, text=True)
    print(done.stdout, done.stderr, flush=True)
    if done.returncode:
        raise RuntimeError((done.stderr or done.stdout).strip().splitlines()[-1])
    return {"status": 0, "said": done.stdout.strip()[-160:]}
