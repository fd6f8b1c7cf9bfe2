"""benchmarks/step.py: what its ratio is of, and that a trainer which dies leaves a row and no more."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

pytest.importorskip("matplotlib")  # a GPU machine without network may lack it

from benchmarks import contestants, step
from benchmarks.contestants import CONTESTANTS, Contestant, Trainer
from benchmarks.step_page import section

JOB = {"model": {}, "length": 8, "batch": 2, "device": "cuda", "learning_rate": 1e-3}
WORKER = """
import json, sys
def say(**answer):
    print(json.dumps(answer), flush=True)
say(ready=True)
done = 0
for line in sys.stdin:
    done += int(line)
    if done > {lasts}:
        {end}
    say(seconds=1.0, cpu_seconds=1.0, memory_bytes=1, steps=int(line), loss=2.0)
"""
SAYS_WHY = "say(error='OutOfMemoryError: CUDA out of memory. Tried to allocate 7.00 GiB'); sys.exit(1)"
SAYS_NOTHING = "sys.exit(1)"


class Pretended(Trainer):
    """A trainer whose process has no network: it dies after some steps, with a word or without."""

    def __init__(self, contestant: Contestant, folder: Path, lasts: int, end: str = SAYS_WHY):
        super().__init__(contestant, JOB, folder)
        self.code = WORKER.format(lasts=lasts, end=end)

    def _spawn(self, python: str, rank: int, port: int) -> "subprocess.Popen[str]":
        pipe = subprocess.PIPE
        with self.log.open("a") as log:
            return subprocess.Popen([sys.executable, "-c", self.code], stdin=pipe, stdout=pipe, stderr=log, text=True)


def rows(trainers: list[Trainer], alone: bool, monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Three rounds of two steps, after a first one and two to warm up."""
    monkeypatch.setattr(step, "matrix_ceiling", lambda device: 1e12)
    try:
        for _ in step.compete(trainers, 3, 2, alone, torch.device("cpu"), Console(quiet=True)):
            pass
    finally:
        for trainer in trainers:
            trainer.stop()
    counted = {"flops_per_token_causal": 1.0, "flops_per_token_full": 1.0}
    return [trainer.row(counted, {"measured": 1.0}) for trainer in trainers]


@pytest.mark.parametrize("end", [SAYS_WHY, SAYS_NOTHING], ids=["says why", "says nothing"])
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("lasts", [0, 1, 4], ids=["first step", "warm-up", "round"])
def test_a_trainer_that_dies_has_a_row_and_the_others_go_on(tmp_path, monkeypatch, lasts: int, alone: bool, end: str):
    adamw, fold = (next(one for one in CONTESTANTS if one.optimizer == name) for name in ("AdamW", "Tiger"))
    trainers = [Pretended(adamw, tmp_path, lasts, end), Pretended(fold, tmp_path, 100)]
    dead, alive = rows(trainers, alone, monkeypatch)
    assert dead["reason"].startswith("OutOfMemoryError: CUDA" if end == SAYS_WHY else "ended with status 1")
    assert len(alive["rounds"]) == 3 and "reason" not in alive


def test_one_that_died_before_its_order_is_sent_home(tmp_path):
    """Its pipe is closed at the other end: writing to it raises, and so does closing it with what was not written."""
    trainer = Pretended(CONTESTANTS[0], tmp_path, 100)
    trainer.start()
    trainer.processes[0].kill()
    trainer.processes[0].wait()
    trainer.round(1)
    assert "Broken pipe" in trainer.reason
    trainer.stop()


def ran(name: str, optimizer: str, speed: float, **more: object) -> dict:
    speeds = dict.fromkeys(("tokens_per_second", "tokens_in_first_minute", "tokens_per_cpu_second"), speed)
    return {"name": name, "peer": name == "peer", "optimizer": optimizer} | speeds | more


def test_the_ratio_is_of_the_same_optimizer_where_it_ran():
    peer, adamw, fold = ran("peer", "AdamW", 100.0), ran("own", "AdamW", 120.0), ran("fold", "Tiger", 200.0)
    found = step.summarise([peer, adamw, fold])
    assert found["ratio_to_best_peer"] == 1.2 and "ratio_note" not in found
    found = step.summarise([peer, adamw | {"reason": "OutOfMemoryError: CUDA out of memory."}, fold])
    assert found["ratio_to_best_peer"] == 2.0 and found["ratio_note"] == "with Tiger under fold: AdamW does not fit"
    assert step.summarise([peer, fold])["ratio_note"] == "with Tiger under fold: no row with AdamW ran"
    assert step.summarise([adamw, fold]) == {"ratio_to_best_peer": None}


def test_the_page_says_what_the_ratio_is_of():
    result = {
        "shape": "8b", "parameters": 8e9, "length": 8192, "batch": 1, "where": "a GPU", "command": "x", "torch": "2",
        "load": 1.0, "ceiling_flops": {"measured": 1e12}, "ratio_to_best_peer": 2.0,
        "ratio_note": "with Tiger under fold: AdamW does not fit",
        "rows": [{"name": "peer", "peer": True, "optimizer": "AdamW", "state": "s", "reason": "r", "recompute": "full"}],
    }  # fmt: skip
    text = section(result)
    assert "**Ratio to the best peer (with Tiger under fold: AdamW does not fit): 2.00**" in text
    assert "| peer, full recomputation |" in text


@pytest.mark.parametrize(
    ("asked", "own", "peer"), [(None, "none", "none"), ("none", "none", "none"), ("selective", "selective", "full")]
)
def test_what_is_recomputed(asked, own, peer):
    for one in step.chosen(argparse.Namespace(recompute=asked, only=[])):
        assert one.options["recompute"] == (peer if one.peer else own)


@pytest.mark.parametrize("frugal", [True, False])
def test_who_runs_out_of_memory_is_started_again_with_recomputation(monkeypatch, tmp_path, frugal):
    """8b without recomputation fits some GPUs under some trainers: each shows it for itself."""
    asked = []

    def spawned(trainer, python, rank, port):
        asked.append(trainer.contestant.options.get("recompute", "none"))
        raise RuntimeError("OutOfMemoryError: CUDA out of memory.") if asked == ["none"] else RuntimeError("something else")

    monkeypatch.setattr(Trainer, "_spawn", spawned)
    trainer = Trainer(CONTESTANTS[0], JOB, tmp_path, here=True, frugal=frugal)
    trainer.start()
    assert asked == (["none", "full"] if frugal else ["none"])
    assert trainer.reason == ("something else" if frugal else "OutOfMemoryError: CUDA out of memory.")


def test_every_contestant_gets_the_same_allocator_and_peers_the_same_torch(monkeypatch, tmp_path):
    started = []
    monkeypatch.setattr(contestants.subprocess, "Popen", lambda command, env, **_: started.append(env))
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    for one in CONTESTANTS:
        Trainer(one, JOB, tmp_path)._spawn("python", 0, 1)
    assert {environment["PYTORCH_CUDA_ALLOC_CONF"] for environment in started} == {"expandable_segments:True"}
    assert torch.__version__.startswith(contestants.TORCH.removeprefix("torch==")) and "+" not in contestants.TORCH


def test_an_environment_with_another_torch_is_made_again(monkeypatch, tmp_path):
    monkeypatch.setattr(contestants, "PEERS", tmp_path)
    commands = []
    done = subprocess.CompletedProcess([], 0)
    monkeypatch.setattr(contestants.subprocess, "run", lambda command, **_: commands.append(command) or done)
    peer = next(one for one in CONTESTANTS if one.peer)
    mark = tmp_path / peer.environment / "installed"
    mark.parent.mkdir()
    mark.write_text("torch==2.0.0")
    for _ in range(2):
        contestants.interpreter(peer, tmp_path / "log")
    assert len(commands) == 2 and contestants.TORCH in commands[-1]
