"""What a run observes while it trains: the same text for every run, every record, and no observation that ends it."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import launch.observers
from data.corpus.shards import Corpus
from launch.inputs import open_data
from launch.isolation import ObservationRunner
from launch.load_config import load_config
from launch.observers import Observers
from launch.train import main
from model.decoder import Decoder
from model.initialization import initialise
from model.parallel.layers import serial_kit
from model.parallel.mesh import Mesh
from tests.ranks import run_ranks
from trainer.evaluate import evaluate
from trainer.monitoring.clock import Clock
from trainer.monitoring.signals import StopSignal, StopVote
from trainer.state import State


def start(rank: int, world_size: int, arguments: list[str], screen: str, broken: bool) -> int:
    """A run in a process of its own, whose observations raise where `broken`, but for those at contexts."""
    os.dup2(os.open(screen, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    for name in ("evaluate", "attention_statistics", "sample") if broken else ():
        setattr(launch.observers, name, _broken)
    return main(arguments)


def _broken(*arguments: object) -> object:
    raise IndexError("piece id is out of range")


def run(*arguments: str, broken: bool = False) -> str:
    """What was on the screen."""
    screen = f"{arguments[0]}.screen"
    assert run_ranks(start, 1, list(arguments), screen, broken, grouped=False) == [0], Path(screen).read_text()
    return Path(screen).read_text()


def evaluations(directory: Path) -> list[dict]:
    records = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if record["kind"] == "evaluate"]


@pytest.fixture
def held_out(configuration: str, corpus: Path) -> tuple[str, str]:
    return configuration, f"data.validation={corpus}/shards/validation"


def test_seeds_batches_and_ranks_compare_the_same_text(held_out: tuple[str, str]):
    """The same weights: seeds gave 4.18, 4.31 and 4.12, half the batch 4.04."""
    base = load_config(*held_out[:1])
    decoder = Decoder(base.model, base.position, 32, serial_kit())
    initialise(decoder, 7)
    found = []
    for overrides in (
        ["run.seed=0"],
        ["run.seed=1"],
        ["run.seed=2"],
        ["train.global_batch_size=4"],
        ["train.micro_batch_size=1"],
    ):
        config = load_config(held_out[0], [held_out[1], "evaluate.tokens=1000", *overrides])
        score = evaluate(decoder, open_data(config, 0, 1).validation.whole(), Mesh())  # type: ignore[union-attr]
        assert score.tokens == 1000
        found.append(score.loss)
    parts = [
        open_data(load_config(held_out[0], [held_out[1], "evaluate.tokens=1000"]), rank, 4).validation for rank in range(4)
    ]
    scores = [evaluate(decoder, part.whole(), Mesh()) for part in parts]  # type: ignore[union-attr]
    assert sum(score.tokens for score in scores) == 1000
    found.append(sum(score.loss * score.tokens for score in scores) / 1000)
    assert found == pytest.approx([found[0]] * 6, rel=1e-6)


def test_a_forward_of_an_evaluation_is_progress(held_out: tuple[str, str], monkeypatch: pytest.MonkeyPatch):
    """health.hang_seconds is patience with a forward, not with a whole evaluation."""
    config = load_config(held_out[0], [held_out[1], "evaluate.tokens=300", "evaluate.contexts=[16]"])
    mesh, beats, lines = Mesh(), [], []
    decoder = Decoder(config.model, config.position, 32, serial_kit())
    initialise(decoder, 7)
    parts: Any = {
        "metrics": SimpleNamespace(record=lambda record: None),
        "progress": SimpleNamespace(line=lines.append),
        "heartbeat": SimpleNamespace(beat=lambda: beats.append(1)),
        "stop": StopVote(stop := StopSignal(), mesh),
        "clock": Clock(mesh.device),
        "runner": ObservationRunner(mesh.world, lines.append, stop),
    }
    validation = open_data(config, 0, 1).validation
    assert validation is not None
    Observers(config, decoder, list, mesh, lambda batch: [], validation, None, **parts).evaluate(State(5))
    assert [line.split(" loss ")[0] for line in lines] == ["step 5: validation", "step 5: contexts"]
    batches = [len(list(validation.whole())), len(list(validation.at(16)))]
    assert len(beats) == sum(batches) and min(batches) > 4
    beats.clear()
    lines.clear()
    monkeypatch.setattr("trainer.monitoring.evaluation_progress.SECONDS", 0.0)
    chunks = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"chunk_tokens": 6})})
    Observers(chunks, decoder, list, mesh, lambda batch: [], validation, None, **parts).evaluate(State(5))
    assert len(beats) == batches[0] + 3 * batches[1], "three chunks of a context are three forwards"
    said = [line.partition(" (")[0] for line in lines if "forwards" in line]
    assert said == [f"step 5: evaluation at context 16: {n} of {3 * batches[1]} forwards" for n in range(1, 3 * batches[1])]
    stop.request("SIGTERM")
    tokenizer: Any = SimpleNamespace(prompt=lambda text: pytest.fail("no sample is made before what is left"))
    beats.clear()
    lines.clear()
    Observers(config, decoder, list, mesh, lambda batch: [], validation, tokenizer, **parts).evaluate(State(5))
    assert len(beats) == 1, "an evaluation is left after a forward, and what follows it with it"
    assert lines == [
        "step 5: the evaluation is left unfinished for the stop; a run that resumes makes it",
        "step 5: the evaluation at context 16 is left for the stop; a run that resumes makes it",
        "step 5: the sample is left for the stop; a run that resumes makes it",
    ]
    beats.clear()
    lines.clear()
    Observers(config, decoder, list, mesh, lambda batch: [], validation, None, **parts).evaluate(State(config.train.steps))
    assert len(beats) == sum(batches) and not any("left" in line for line in lines), "but not the last one of a run"


def test_contexts_stand_beside_the_ordinary_validation(held_out: tuple[str, str], tmp_path: Path):
    overrides = ["train.steps=2", "evaluate.contexts=[64, 16]", "evaluate.tokens=300", "evaluate.every_steps=1"]
    run(*held_out, *overrides)
    found = evaluations(tmp_path / "run")
    wanted = [("validation", 32), ("contexts", 16), ("contexts", 64)]
    assert [(record["step"], record["name"], record["context"]) for record in found] == [
        (step, *pair) for step in (1, 2) for pair in wanted
    ]
    assert all(record["tokens"] == 300 and 0 < record["standard_error"] < 1 and record["loss"] > 1 for record in found)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["evaluate.contexts=[1]"], "evaluate.contexts: a context of 1 must have at least 2 tokens"),
        (["evaluate.contexts=[64, 16, 64]"], "evaluate.contexts: the context 64 is given twice"),
        (["evaluate.contexts=[100000]"], "a context of 100,000 tokens is longer than the text at"),
        (
            ["evaluate.batches=4"],
            "unknown key evaluate.batches; legal here: every_steps, tokens, contexts, chunk_tokens,",
        ),
    ],
)
def test_what_cannot_be_scored_is_refused_before_anything_is_written(
    held_out: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture, overrides: list[str], sentence: str
):
    assert main([*held_out, *overrides]) == 2
    screen = capsys.readouterr().err
    assert screen.startswith("tiglon: ") and sentence in screen and screen.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_an_observation_that_fails_does_not_end_the_run(held_out: tuple[str, str], tmp_path: Path):
    options = ["train.steps=3", "evaluate.tokens=300", "evaluate.every_steps=2", "evaluate.contexts=[16]"]
    options += ["log.attention_every_steps=2", "log.sample_prompt=def"]
    run(*held_out, *options, f"run.dir={tmp_path}/whole")
    screen = run(*held_out, *options, broken=True)
    for what in ("attention diagnostic", "evaluation", "sample"):
        assert f"step 2: the {what} failed: piece id is out of range; training is not affected\n" in screen
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["kind"] == "train"] == [1, 2, 3]
    whole, found = (
        [(record["step"], record["loss"]) for record in evaluations(tmp_path / name) if record["name"] == "contexts"]
        for name in ("whole", "run")
    )
    assert found == whole and [step for step, _ in found] == [2, 3]  # the others are made, of the same run
    assert (tmp_path / "run/logs/rank-0.log").read_text().count("IndexError: piece id is out of range") == 5


def test_a_start_says_what_the_validation_loss_is_of(held_out: tuple[str, str], corpus: Path):
    size = Corpus(f"{corpus}/shards/validation").tokens
    screen = run(*held_out, "train.steps=1")
    assert "has its only step; saved in" in screen
    assert screen.count(f"the validation text allows {size:,} of 131,072 tokens: each is scored once\n") == 1
    screen = run(
        held_out[0],
        "train.steps=1",
        f"data.validation={corpus}/shards/train",
        "evaluate.tokens=64",
    )
    assert f"'{corpus}/shards/train' is also trained on, so its loss is not that of unseen text\n" in screen
