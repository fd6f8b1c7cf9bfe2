"""A network read from a checkpoint, and the position map it is evaluated with."""

from pathlib import Path

import pytest
import torch

from launch.trained import open_checkpoint, parse_position
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
