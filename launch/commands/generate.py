"""`tiglon generate`: continue a prompt with a trained network."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from data.tokenizer.tokenizer import Tokenizer
from launch import runtime
from launch.config import RunConfig
from launch.trained import (
    KEPT_TOKENIZER,
    DeviceOption,
    PositionOption,
    RunOrCheckpoint,
    Trained,
    open_checkpoint,
    parse_position,
)
from model.generate import Sampling, generate
from model.positions.config import PositionConfig


def generate_command(
    checkpoint: RunOrCheckpoint,
    prompt: Annotated[str, typer.Option(help="Text to continue; empty starts a document.")] = "",
    tokens: Annotated[int, typer.Option(help="Tokens to add at most; 0 = up to 200, within the usable context.")] = 0,
    temperature: Annotated[float, typer.Option(help="0 = greedy: the most likely token.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Only the k most likely tokens; 0 = all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Only the most likely tokens up to this total probability.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    position: PositionOption = "",
    tokenizer: Annotated[str, typer.Option(help="Tokenizer directory; default the run's own.")] = "",
    device: DeviceOption = "auto",
) -> None:
    """Continue a prompt; the text streams as it is sampled.

    Example: tiglon generate runs/quickstart --prompt "def main(" --tokens 100
    """
    sampling = Sampling(temperature, top_k, top_p, seed)
    trained = open_checkpoint(checkpoint, runtime.choose_device(device, runtime.world()))
    vocabulary = Tokenizer.load(tokenizer or _tokenizer_directory(trained))
    end = vocabulary.end_of_text
    ids = [end, *vocabulary.encode(prompt)]
    evaluated = parse_position(position, trained.config.evaluate.position or trained.config.position)
    count = new_tokens(trained.config, evaluated, len(ids), tokens)
    sys.stdout.write(prompt)
    sampled: list[int] = []
    text = shown = ""
    for step in generate(trained.decoder, [ids], count, sampling, end, evaluated, vocabulary.vocab_size):
        sampled.extend(token for token in step if token is not None and token != end)
        text = vocabulary.decode(sampled)
        if not text.endswith("\ufffd"):  # the first bytes of a character are held back until it is complete
            sys.stdout.write(text[len(shown) :])
            sys.stdout.flush()
            shown = text
    sys.stdout.write(text[len(shown) :] + "\n")


def _tokenizer_directory(trained: Trained) -> str:
    kept = Path(trained.path) / KEPT_TOKENIZER
    directory = str(kept) if kept.is_dir() else trained.config.data.tokenizer
    if not directory:
        raise ValueError(f"{trained.path} names no tokenizer; give one with --tokenizer DIR")
    return directory


def new_tokens(config: RunConfig, evaluated: PositionConfig, prompt: int, requested: int) -> int:
    """How many tokens to add to a prompt of `prompt` tokens, evaluated with that position map.

    Args:
        requested: --tokens; 0 = up to 200.

    Raises:
        ValueError: the text would grow longer than the context that the position map can use.
    """
    if requested < 0:
        raise ValueError(f"--tokens {requested} must be 0 (up to 200, within the usable context) or above")
    length = config.train.sequence_length
    limit = evaluated.usable_length(config.position, length)
    if limit is not None and prompt + max(requested, 1) > limit:
        raise ValueError(
            f"a prompt of {prompt} tokens and {max(requested, 1)} new ones exceed the {limit} that a model trained at {length} "
            f"can use with position '{evaluated.kind}'; ask for fewer or use --position rerope,window={max(1, length // 4)}"
        )
    if requested:
        return requested
    return 200 if limit is None else min(200, limit - prompt)
