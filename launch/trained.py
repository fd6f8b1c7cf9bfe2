"""A trained network read from a checkpoint, for commands that evaluate it or generate with it, and their shared options."""

from dataclasses import dataclass
from typing import Annotated

import torch
import typer
from pydantic import ValidationError

from launch.checkpoints import find_checkpoint, load_checkpoint, read_meta
from launch.config import RunConfig, build_config, validation_sentence
from model.decoder import Decoder
from model.parallel.layers import serial_kit
from model.positions.config import PositionConfig
from trainer.checkpoint.rectangles import Shard

RunOrCheckpoint = Annotated[str, typer.Argument(help="Checkpoint, or a run: its newest one.", metavar="RUN_OR_CHECKPOINT")]
PositionOption = Annotated[str, typer.Option(help="Position map, as rerope,window=512; default the trained one.")]
DeviceOption = Annotated[str, typer.Option(help="auto (cuda where there is one), cpu or cuda.")]

KEPT_TOKENIZER = "tokenizer"
"""Directory inside an imported checkpoint that holds the files of its tokenizer."""


@dataclass(frozen=True)
class Trained:
    """A network with the weights of one checkpoint."""

    path: str
    """The checkpoint."""
    step: int
    config: RunConfig
    """As the checkpoint records it."""
    decoder: Decoder


def open_checkpoint(address: str, device: torch.device) -> Trained:
    """Read the network of a checkpoint, or of a run's newest one, in the precision it was trained in (train.precision).

    Raises:
        FileNotFoundError, ValueError: one sentence.
    """
    path = find_checkpoint(address)
    meta = read_meta(path)
    config = build_config(meta.config, where=f"the configuration in {path}")
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    with torch.device(device):
        decoder = Decoder(config.model, config.position, config.train.sequence_length, serial_kit(dtype))
    shards = [
        Shard(f"weight/{name}", tuple(weight.shape), tuple(weight.shape), (0,) * weight.dim(), 0, weight.data.view(-1))
        for name, weight in decoder.named_parameters()
    ]
    load_checkpoint(path, shards)
    return Trained(path, meta.step, config, decoder)


def parse_position(text: str, trained: PositionConfig) -> PositionConfig:
    """The position map that `kind,name=value,...` asks for; what it leaves out is as trained, "" = the trained map.

    Raises:
        ValueError: one sentence.
    """
    if not text:
        return trained
    kind, *settings = text.split(",")
    values: dict[str, object] = {"kind": kind.strip()}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"--position {text}: '{setting}' must read name=value, as in rerope,window=512")
        values[name.strip()] = value.strip()
    try:
        return PositionConfig.model_validate(trained.evaluation_values(values))
    except ValidationError as error:
        raise ValueError(f"--position {text}: {validation_sentence(error)}") from None
