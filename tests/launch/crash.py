"""Kill a two-rank run again and again, many times inside a save, and compare what comes out with an undisturbed run."""

import json
import multiprocessing
import os
import random
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

from data.ingest.prepare import PrepareOptions, prepare
from data.tokenizer.train import train_tokenizer
from launch.checkpoints import find_checkpoint, read_tensor, tensor_names, verify_checkpoint
from launch.train import main
from trainer.checkpoint.manifest import FILE

EVERY_STEPS = 5
_context = multiprocessing.get_context("forkserver")


@dataclass
class Outcome:
    """What 50 deaths looked like: (when, who, half-written save left behind, step reached) of each."""

    deaths: list[tuple[str, str, bool, int]] = field(default_factory=list)

    @property
    def inside_a_save(self) -> int:
        """Deaths that left a half-written checkpoint."""
        return sum(death[2] for death in self.deaths)


def make_run(folder: Path, steps: int) -> str:
    """A small corpus of this repository's own text and the configuration of a run over it; the TOML file."""
    inputs = [str(Path(__file__).parent.parent.parent / "model" / "**" / "*.py")]
    train_tokenizer(inputs, str(folder / "tokenizer"), 512)
    prepare(inputs, str(folder / "tokenizer"), str(folder / "shards"), PrepareOptions(validation_fraction=0.3))
    text = f"""
        [run]
        dir = "{folder}/run"
        device = "cpu"
        [model]
        vocab_size = 512
        hidden_size = 32
        intermediate_size = 64
        num_hidden_layers = 2
        num_attention_heads = 4
        [data]
        tokenizer = "{folder}/tokenizer"
        train = "{folder}/shards/train"
        validation = "{folder}/shards/validation"
        [train]
        steps = {steps}
        sequence_length = 32
        global_batch_size = 4
        micro_batch_size = 2
        [checkpoint]
        every_steps = {EVERY_STEPS}
        [evaluate]
        every_steps = 20
        tokens = 128
        [log]
        every_steps = 1
        tensorboard = false
    """
    path = folder / "run.toml"
    path.write_text("\n".join(line.strip() for line in text.splitlines()))
    return str(path)


def _one_rank(rank: int, port: int, arguments: list[str]) -> None:
    os.setsid()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    raise SystemExit(main(arguments))


def start(*arguments: str) -> list[BaseProcess]:
    """Two ranks of `launch.train`, as torchrun would start them."""
    _context.set_forkserver_preload(["torch", "torch.distributed", "tests.preload"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [_context.Process(target=_one_rank, args=(rank, port, list(arguments)), daemon=True) for rank in range(2)]
    for process in ranks:
        process.start()
    return ranks


def finish(*arguments: str, timeout_seconds: float = 600) -> None:
    """Run to the end.

    Raises:
        AssertionError: a rank did not end well.
    """
    ranks = start(*arguments)
    deadline = time.monotonic() + timeout_seconds
    for process in ranks:
        process.join(max(0.1, deadline - time.monotonic()))
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    assert codes == [0, 0], f"the ranks ended with {codes}"


def disturb(configuration: str, directory: Path, kills: int, seed: int) -> Outcome:
    """Start the run and kill it, `kills` times; then let it finish."""
    draw = random.Random(seed)
    outcome = Outcome()
    for _ in range(kills):
        when = draw.choices(["in a save", "any time", "at the start"], [70, 20, 10])[0]
        who = draw.choice(["both", "0 first", "1 first"])
        ranks = start(configuration, f"run.dir={directory}")
        _wait(when, draw, directory / "checkpoints", ranks)
        _kill(who, draw, ranks)
        outcome.deaths.append((when, who, *_look(directory / "checkpoints")))
    finish(configuration, f"run.dir={directory}")
    return outcome


def _wait(when: str, draw: random.Random, checkpoints: Path, ranks: list[BaseProcess]) -> None:
    """Until the moment to die."""
    if when == "at the start":
        time.sleep(draw.uniform(0, 3))
        return
    before = _newest(checkpoints)
    _until(lambda: _newest(checkpoints) > before, ranks)
    if when == "in a save":
        wanted = draw.random()  # early or late in the save: when the directory appears, or when its files do
        _until(lambda: len(list(checkpoints.glob(".step-*.partial/*" if wanted < 0.5 else ".step-*.partial"))) > 0, ranks)
        time.sleep(draw.uniform(0, 0.004))
    else:
        time.sleep(draw.uniform(0, 0.3))


def _until(condition: Callable[[], bool], ranks: list[BaseProcess]) -> None:
    while not condition() and all(process.is_alive() for process in ranks):
        time.sleep(0.0002)


def _newest(checkpoints: Path) -> int:
    return max((int(path.name[5:]) for path in checkpoints.glob("step-*")), default=0)


def _kill(who: str, draw: random.Random, ranks: list[BaseProcess]) -> None:
    order = ranks if who != "1 first" else ranks[::-1]
    assert all(process.is_alive() for process in ranks), f"ended by itself: {[process.exitcode for process in ranks]}"
    for process in order:
        process.kill()  # SIGKILL
        if who != "both":
            time.sleep(draw.uniform(0, 0.3))
    for process in ranks:
        process.join()


def _look(checkpoints: Path) -> tuple[bool, int]:
    """Whether a half-written save was left, and the newest step; every visible checkpoint must be intact."""
    for path in checkpoints.glob("step-*"):
        verify_checkpoint(path)
    return any(not (path / FILE).exists() for path in checkpoints.glob(".step-*.partial")), _newest(checkpoints)


def assert_same(one: Path, other: Path) -> None:
    """Metrics and final weights and states of two runs are equal bit for bit."""
    assert _records(one) == _records(other)
    first, second = find_checkpoint(one), find_checkpoint(other)
    assert Path(first).name == Path(second).name and tensor_names(first) == tensor_names(second)
    for name in tensor_names(first):
        assert read_tensor(first, name).equal(read_tensor(second, name)), name


def _records(directory: Path) -> list[tuple]:
    """What is not of the clock or the machine, with every digit."""
    records = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    keys = ("kind", "step", "tokens", "loss", "grad_norm", "learning_rate", "name", "context")
    return [tuple(record.get(key) for key in keys) for record in records if record["kind"] in ("train", "evaluate")]
