"""`tiglon generate` on a small checkpoint."""

import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from data.tokenizer.tokenizer import Tokenizer
from launch.cli import app
from launch.commands.generate import new_tokens
from launch.config import RunConfig
from launch.trained import open_checkpoint
from model.generate import generate
from model.positions.config import PositionConfig
from tests.launch.commands.test_evaluate import run


def test_generation_is_that_of_the_network(run_directory: Path):
    text = run("generate", run_directory, "--prompt", "def return", "--tokens", 12, "--temperature", 0)
    trained = open_checkpoint(str(run_directory), torch.device("cpu"))
    words = Tokenizer.load(trained.config.data.tokenizer)
    made = [row[0] for row in generate(trained.decoder, [[words.end_of_text, *words.encode("def return")]], 12)]
    assert text == "def return" + words.decode(made) + "\n"


def test_a_text_longer_than_the_usable_context_is_refused():
    config = RunConfig.model_validate({"train": {"sequence_length": 128}})
    assert new_tokens(config, config.position, 100, 0) == 28
    assert new_tokens(config, PositionConfig(kind="rerope", window=32), 1000, 0) == 200
    with pytest.raises(ValueError, match="exceed the 128 that a model trained at 128 can use with position 'rope'"):
        new_tokens(config, config.position, 128, 0)
    with pytest.raises(ValueError, match="a prompt of 100 tokens and 29 new ones"):
        new_tokens(config, config.position, 100, 29)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("generate", "{run}", "--top-p", "0"), "top_p = 0.0 must lie in"),
        (("generate", "{run}", "--top-p", "nan"), "top_p = nan must lie in"),
        (("generate", "{run}", "--top-p", "inf"), "top_p = inf must lie in"),
        (("generate", "{run}", "--top-k", "-1"), "top_k = -1 must be 0"),
        (
            ("generate", "{run}", "--temperature", "nan"),
            "temperature = nan must be 0 (greedy) or a finite number from 1e-06 on",
        ),
        (("generate", "{run}", "--temperature", "inf"), "temperature = inf must be 0"),
        (("generate", "{run}", "--temperature", "-1"), "temperature = -1.0 must be 0"),
        (("generate", "{run}", "--temperature", "1e-300"), "temperature = 1e-300 must be 0"),
        (("generate", "{run}", "--seed", str(1 << 70)), "must lie between -2**62 and 2**62"),
        (("generate", "{run}", "--tokens", "99"), "exceed the 32"),
    ],
)
def test_a_mistake_is_one_sentence(run_directory: Path, arguments: tuple[str, ...], sentence: str):
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(sentence)) as caught:
        CliRunner().invoke(app, [part.format(run=run_directory) for part in arguments], catch_exceptions=False)
    assert "\n" not in str(caught.value)
