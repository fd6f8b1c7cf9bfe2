"""Who trains in benchmarks/step.py, at which sizes, and how each is started and driven."""

import json
import os
import socket
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from launch import runtime

ROOT = Path(__file__).parent.parent
PEERS = ROOT / "build/peers"
TORCH = "torch==" + version("torch").partition("+")[0]
"""What peers get: the version that tiglon runs, so that trainers are compared and not releases of torch."""


@dataclass(frozen=True)
class Shape:
    """A network and how much of it a step sees."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    tokens: int
    """Of a step and rank."""

    def model(self) -> dict[str, Any]:
        sizes = {name: getattr(self, name) for name in list(self.__dataclass_fields__) if name != "tokens"}
        return sizes | {"tie_word_embeddings": False}


SHAPES = {
    "quickstart": Shape(4096, 256, 704, 4, 4, 4, 2048),
    "8m": Shape(4096, 256, 704, 8, 4, 4, 4096),
    "30m": Shape(8192, 512, 1536, 6, 8, 8, 4096),
    "125m": Shape(32000, 768, 2048, 12, 12, 12, 16384),
    "1b": Shape(32000, 2048, 5632, 22, 32, 4, 16384),
    "3b": Shape(128256, 3072, 8192, 28, 24, 8, 8192),
    "8b": Shape(128256, 4096, 14336, 32, 32, 8, 8192),
}
"""The last two are Llama 3.2 3B and Llama 3 8B with a head of their own. AdamW with masters holds 22 bytes per parameter in
its update: 79 GB of 3b, which a large GPU has, and 177 GB of 8b, which none has."""


@dataclass(frozen=True)
class Contestant:
    """A way to train, and where it lives."""

    name: str
    module: str
    environment: str = ""
    """Folder under build/peers; empty = tiglon's own environment."""
    packages: tuple[str, ...] = ()
    optimizer: str = "AdamW"
    state: str = "bf16 weights"
    options: dict[str, Any] = field(default_factory=dict)
    ranks: int = 1

    @property
    def peer(self) -> bool:
        return bool(self.environment)

    def runs_on(self, device: str) -> bool:
        """Whether it has a row there: one GPU is for one rank, and a CPU has no CUDA graphs."""
        return self.ranks == 1 if device == "cuda" else not self.options.get("cuda_graphs")


MASTERS = "bf16 weights, fp32 masters"
FOLD: dict[str, Any] = {"engine": "fold", "optimizer": "tiger"}
GRAPHS: dict[str, Any] = {"compile": True, "cuda_graphs": True}
HF: dict[str, Any] = {"environment": "transformers", "packages": ("transformers", "accelerate")}
CONTESTANTS = [
    Contestant("tiglon, eager", "tiglon", state=MASTERS),
    Contestant("tiglon, compiled", "tiglon", state=MASTERS, options={"compile": True}),
    Contestant("tiglon, compiled, CUDA graphs", "tiglon", state=MASTERS, options=GRAPHS),
    Contestant("tiglon, fold", "tiglon", optimizer="Tiger", options=FOLD),
    Contestant("tiglon, fold, compiled", "tiglon", optimizer="Tiger", options={**FOLD, "compile": True}),
    Contestant("tiglon, fold, compiled, CUDA graphs", "tiglon", optimizer="Tiger", options={**FOLD, **GRAPHS}),
    Contestant("tiglon, 2 ranks", "tiglon", state=MASTERS, ranks=2),
    Contestant("tiglon, 2 ranks, compiled", "tiglon", state=MASTERS, ranks=2, options={"compile": True}),
    Contestant("transformers, loop", "transformers_loop", **HF),
    Contestant("transformers, loop, compiled", "transformers_loop", options={"compile": True}, **HF),
    Contestant("transformers, loop, layers compiled", "transformers_loop", options={"compile": "layers"}, **HF),
    Contestant("transformers, Trainer", "transformers_trainer", state="fp32 weights, autocast", **HF),
    Contestant("litgpt, compiled", "litgpt_pretrain", "litgpt", ("litgpt",), options={"compile": True}),
    Contestant("litgpt, eager", "litgpt_pretrain", "litgpt", ("litgpt",)),
    Contestant(
        "torchtitan, compiled", "torchtitan_train", "torchtitan", ("torchtitan",), state="fp32 weights, bf16 gathered",
        options={"compile": True},
    ),
]  # fmt: skip


def interpreter(contestant: Contestant, log: Path) -> str:
    """The Python of its environment, made at the first call. Raises RuntimeError when that fails."""
    if not contestant.peer:
        return sys.executable
    folder = PEERS / contestant.environment
    python, done = folder / "bin/python", folder / "installed"
    if not done.exists() or done.read_text() != TORCH:
        steps = (
            [sys.executable, "-m", "venv", str(folder)],
            [str(python), "-m", "pip", "install", "--quiet", TORCH, *contestant.packages],
        )
        for command in steps:
            with log.open("a") as words:
                result = subprocess.run(command, stdout=words, stderr=subprocess.PIPE, text=True)
            if result.returncode:
                raise RuntimeError(f"does not install: {result.stderr.strip().splitlines()[-1][:200]}")
        done.write_text(TORCH)
    return str(python)


class Trainer:
    """A contestant's processes, one per rank, driven over their stdin."""

    def __init__(self, contestant: Contestant, job: dict[str, Any], folder: Path, *, here: bool = False, frugal: bool = False):
        """
        Args:
            here: a peer runs in this very Python, for machines without a network to install one from.
            frugal: where memory does not suffice, start once more with full recomputation.
        """
        self.contestant, self.job, self.here, self.frugal = contestant, job, here, frugal
        self.cache = str(folder / contestant.name.replace(" ", "-"))
        """Of the compiler, empty at first."""
        self.log = Path(self.cache + ".log")
        self.processes: list[subprocess.Popen[str]] = []
        self.reason = ""
        self.startup_seconds = self.first_step_seconds = self.first_loss = float("nan")
        self.answers: list[dict[str, Any]] = []

    def start(self) -> None:
        """Start it, wait until it is built, and train its first step."""
        self._start()
        if self.frugal and "out of memory" in self.reason.lower():
            self.contestant = replace(self.contestant, options=self.contestant.options | {"recompute": "full"})
            self.reason, self.frugal = "", False
            self._start()

    def _start(self) -> None:
        try:
            python = sys.executable if self.here else interpreter(self.contestant, self.log)
            begin = time.monotonic()
            port = _free_port()
            self.processes = [self._spawn(python, rank, port) for rank in range(self.contestant.ranks)]
            self._answers()
            ready = time.monotonic()
            first = self.order(1)
            if not self.answers:
                self.startup_seconds, self.first_step_seconds = ready - begin, time.monotonic() - ready
                self.first_loss = first["loss"]
        except (RuntimeError, OSError) as error:
            self.reason = str(error)
            self.stop()

    def _spawn(self, python: str, rank: int, port: int) -> "subprocess.Popen[str]":
        ranks = self.contestant.ranks
        environment = dict(os.environ) if self.contestant.peer else runtime.rank_environment(ranks)
        environment |= {"TORCHINDUCTOR_CACHE_DIR": self.cache, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        if self.here:
            environment |= runtime.import_path()  # what this Python finds, the peer among it
        environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # tiglon's own comes after the tokens
        if ranks > 1:
            world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            environment |= {name: str(value) for name, value in world.items()}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        job = self.job | {"options": self.contestant.options, "batch": self.job["batch"] // self._shared()}
        command = [python, "-m", f"benchmarks.peers.{self.contestant.module}", json.dumps(job)]
        with self.log.open("a") as log:
            return subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )

    def _data_ranks(self) -> int:
        """Ranks with tokens of their own; those of one tensor-parallel group see the same."""
        return self.contestant.ranks // self.contestant.options.get("tensor_parallel_size", 1)

    def _shared(self) -> int:
        """On a CPU ranks share the cores, so they share the step's tokens; on GPUs each has its own."""
        return self._data_ranks() if self.job["device"] == "cpu" else 1

    def order(self, steps: int) -> dict[str, Any]:
        """Train `steps` steps; the answer of the slowest rank, with the processor time of all."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(f"{steps}\n")
            process.stdin.flush()
        found = self._answers()
        cpu_seconds = sum(answer["cpu_seconds"] for answer in found)
        return max(found, key=lambda answer: answer["seconds"]) | {"cpu_seconds": cpu_seconds}

    def _answers(self) -> list[dict[str, Any]]:
        found = []
        for process in self.processes:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(self._last_words(process.wait()))
            found.append(json.loads(line))
            if "error" in found[-1]:
                raise RuntimeError(found[-1]["error"])
        return found

    def _last_words(self, status: int) -> str:
        lines = [line.strip() for line in self.log.read_text().splitlines() if line.strip()]
        return lines[-1][:200] if lines else f"ended with status {status}"

    def warm_up(self, steps: int) -> None:
        """Steps that do not count."""
        self.round(steps)
        if not self.reason:
            self.answers.pop()

    def round(self, steps: int) -> None:
        """One turn."""
        if self.reason:
            return
        try:
            self.answers.append(self.order(steps))
        except (RuntimeError, OSError) as error:
            self.reason = str(error)

    def stop(self) -> None:
        """Send it home."""
        for process in self.processes:
            if process.stdin is not None:
                with suppress(BrokenPipeError):  # one that has died cannot take what was written to it
                    process.stdin.close()
        for process in self.processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()
        self.processes = []

    def row(self, shape: dict[str, Any], peaks: dict[str, float]) -> dict[str, Any]:
        """What is reported of it."""
        own = self.contestant
        row = {"name": own.name, "peer": own.peer, "optimizer": own.optimizer, "state": own.state, "ranks": own.ranks}
        row["recompute"] = own.options.get("recompute", "none")
        if self.reason or not self.answers:
            return row | {"reason": self.reason or "not run"}
        tokens = self.job["batch"] * self.job["length"] * self._data_ranks() // self._shared()
        ranks = own.ranks if self.job["device"] != "cpu" else 1
        speeds = [tokens * answer["steps"] / answer["seconds"] for answer in self.answers]
        frugality = [tokens * answer["steps"] / answer["cpu_seconds"] for answer in self.answers]
        speed, wait = statistics.median(speeds), self.startup_seconds + self.first_step_seconds
        row |= {
            "tokens_per_second": speed,
            "rounds": speeds,
            "tokens_per_cpu_second": statistics.median(frugality),
            "tokens_in_first_minute": max(0.0, 60.0 - wait) * speed,
            "startup_seconds": self.startup_seconds,
            "first_step_seconds": self.first_step_seconds,
            "memory_bytes": max(answer["memory_bytes"] for answer in self.answers),
            "first_loss": self.first_loss,
            "last_loss": self.answers[-1]["loss"],
        }
        for against, peak in peaks.items():
            for counted in ("causal", "full"):
                row[f"mfu_{counted}_of_{against}"] = speed * shape[f"flops_per_token_{counted}"] / (peak * ranks)
        return row


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
