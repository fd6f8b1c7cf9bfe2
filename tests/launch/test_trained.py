"""A network read from a checkpoint, and the position map it is evaluated with."""

from pathlib import Path
from typing import Any

import pytest
import torch

from launch.config import RunConfig
from launch.trained import Trained, evaluation_position, new_tokens, open_checkpoint
from model.decoder import Decoder
from model.initialization import initialise
from model.parallel.layers import serial_kit
from model.positions.config import PositionConfig


def test_a_checkpoint_gives_the_weights_that_were_saved(run_directory: Path):
    trained = open_checkpoint(str(run_directory), torch.device("cpu"))
    assert (trained.step, trained.path) == (3, f"{run_directory}/checkpoints/step-00000003")
    saved = Decoder(trained.config.model, trained.config.position, 32, serial_kit())
    initialise(saved, 5)
    for name, weight in saved.named_parameters():
        assert torch.equal(trained.decoder.get_parameter(name), weight), name


TRAINED = PositionConfig(rope_theta=5000.0, log_n="trained")


def trained_with(evaluated: PositionConfig | None = None) -> Trained:
    config = RunConfig.model_validate({"position": TRAINED, "evaluate": {"position": evaluated}})
    return Trained("", 0, config, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "asked",
    [
        "leaky-rerope,window=8,leak=4",
        {"kind": "leaky-rerope", "window": 8, "leak": 4},
        PositionConfig(kind="leaky-rerope", window=8, leak=4),
    ],
)
def test_what_a_position_leaves_unset_is_as_trained(asked: Any):
    whole = PositionConfig(kind="leaky-rerope", window=8, leak=4, rope_theta=5000.0, log_n="trained")
    other = PositionConfig(kind="rerope", window=4, rope_theta=3.0)
    assert evaluation_position(trained_with(), asked) == evaluation_position(trained_with(other), asked) == whole
    assert evaluation_position(trained_with(), "rope,log_n=none") == PositionConfig(rope_theta=5000.0)
    assert evaluation_position(trained_with(), "") == TRAINED and evaluation_position(trained_with(other), None) == other


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("rerope", "needs window >= 1"),
        ("rerope,window=0", "needs window >= 1"),
        ("leaky-rerope,window=4,leak=0", "needs leak > 0"),
        ("rerope,8", "'8' must read name=value"),
        ("rerope,windov=8", "unknown key windov"),
        ("rope,windowed_rope_theta=50", "position rope,.*: windowed_rope_theta = 50.0 has no layer to act in"),
    ],
)
def test_a_bad_position_is_one_sentence(text: str, sentence: str):
    with pytest.raises(ValueError, match=sentence) as caught:
        evaluation_position(trained_with(), text)
    assert "\n" not in str(caught.value)


def test_a_text_longer_than_the_usable_context_is_refused():
    config = RunConfig.model_validate({"train": {"sequence_length": 128}})
    assert new_tokens(config, config.position, 100, 0) == 28
    assert new_tokens(config, PositionConfig(kind="rerope", window=32), 1000, 0) == 200
    with pytest.raises(ValueError, match="exceed the 128 that a model trained at 128 can use with position 'rope'"):
        new_tokens(config, config.position, 128, 0)
    with pytest.raises(ValueError, match="a prompt of 100 tokens and 29 more"):
        new_tokens(config, config.position, 100, 29)
    with pytest.raises(ValueError, match="a prompt of 1 token and 128 more"):
        new_tokens(config, config.position, 1, 128)
