"""`tiglon evaluate` and `tiglon generate` on a small checkpoint."""

import json
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from data.tokenizer import Tokenizer
from launch.cli import app
from launch.config import RunConfig, load
from launch.read import new_tokens, open_checkpoint, parse_position
from model.config import PositionConfig
from model.decoder import Decoder, initialise
from model.generate import generate
from model.layers import serial
from trainer.checkpoint import Checkpoints, Meta
from trainer.config import CheckpointConfig
from trainer.rectangles import Shard


@pytest.fixture
def run_directory(configuration: str, corpus: Path, tmp_path: Path) -> Path:
    """A run with one checkpoint of random weights."""
    config = load(configuration, [f"data.validation={corpus}/shards/validation", "evaluate.batches=2"])
    decoder = Decoder(config.model, config.position, 32, serial())
    initialise(decoder, 5)
    shards = [
        Shard(f"weight/{name}", tuple(p.shape), tuple(p.shape), (0,) * p.dim(), 0, p.detach().reshape(-1))
        for name, p in decoder.named_parameters()
    ]
    kept = Checkpoints(str(tmp_path / "run/checkpoints"), CheckpointConfig(asynchronous=False), 0, 1, None, lambda text: None)
    kept.save(shards, Meta(3, 99, config.model_dump(mode="json")))
    kept.close()
    return tmp_path / "run"


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_contexts_as_a_table_records_and_a_plot(run_directory: Path, tmp_path: Path):
    arguments = ("--contexts", "16,32,64", "--position", "rerope,window=8", "--batches", 1, "--output", tmp_path / "scores")
    text = run("evaluate", run_directory, *arguments)
    rows = re.findall(r"^\W*(\d+)\W+(\d[\d,]*)\W+(\d\.\d{4})\W+([\d,.]+)", text, re.MULTILINE)
    assert [row[0] for row in rows] == ["16", "32", "64"]
    assert len({row[1] for row in rows}) == 1  # the same tokens each time
    records = [json.loads(line) for line in (tmp_path / "scores/metrics.jsonl").read_text().splitlines()]
    seen = [(record["kind"], record["step"], record["context"]) for record in records]
    assert seen == [("evaluate", 3, 16), ("evaluate", 3, 32), ("evaluate", 3, 64)]
    assert [f"{record['loss']:.4f}" for record in records] == [row[2] for row in rows]
    assert (tmp_path / "scores/contexts.png").read_bytes()[:4] == b"\x89PNG"


def test_generation_is_that_of_the_network(run_directory: Path):
    text = run("generate", run_directory, "--prompt", "def return", "--tokens", 12, "--temperature", 0)
    trained = open_checkpoint(str(run_directory), torch.device("cpu"))
    words = Tokenizer.load(trained.config.data.tokenizer)
    made = [row[0] for row in generate(trained.decoder, [[words.end_of_text, *words.encode("def return")]], 12)]
    assert text == "def return" + words.decode(made) + "\n"


def test_positions_are_read_from_text():
    trained = PositionConfig(rope_theta=5000.0, log_n="trained")
    assert parse_position("", trained) is trained
    found = parse_position("leaky-rerope,window=8,leak=4", trained)
    assert found == PositionConfig(kind="leaky-rerope", window=8, leak=4, rope_theta=5000.0, log_n="trained")
    assert parse_position("rope,log_n=none", trained) == PositionConfig(rope_theta=5000.0)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("rerope", "needs window >= 1"),
        ("rerope,window=0", "needs window >= 1"),
        ("leaky-rerope,window=4,leak=0", "needs leak > 0"),
        ("rerope,8", "'8' must read name=value"),
        ("rerope,windov=8", "unknown key windov"),
    ],
)
def test_a_bad_position_is_one_sentence(text: str, sentence: str):
    with pytest.raises(ValueError, match=sentence) as caught:
        parse_position(text, PositionConfig())
    assert "\n" not in str(caught.value)


def test_a_text_longer_than_the_map_reads_is_refused():
    config = RunConfig.model_validate({"train": {"sequence_length": 128}})
    assert new_tokens(config, config.position, 100, 0) == 28
    assert new_tokens(config, PositionConfig(kind="rerope", window=32), 1000, 0) == 200
    with pytest.raises(ValueError, match="beyond the 128 that a model trained at 128 reads with position 'rope'"):
        new_tokens(config, config.position, 128, 0)
    with pytest.raises(ValueError, match="a prompt of 100 tokens and 29 new ones"):
        new_tokens(config, config.position, 100, 29)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("evaluate", "{run}", "--contexts", "8,x"), "--contexts 8,x must be numbers"),
        (("evaluate", "{run}", "--contexts", "1,8"), "context 1 must lie between 2 and 8"),
        (("evaluate", "/nowhere"), "neither a checkpoint nor a run"),
        (("generate", "{run}", "--top-p", "0"), "top_p = 0.0 must lie in"),
        (("generate", "{run}", "--tokens", "99"), "go beyond the 32"),
    ],
)
def test_a_mistake_is_one_sentence(run_directory: Path, arguments: tuple[str, ...], sentence: str):
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(sentence)) as caught:
        CliRunner().invoke(app, [part.format(run=run_directory) for part in arguments], catch_exceptions=False)
    assert "\n" not in str(caught.value)
