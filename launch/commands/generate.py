"""`tiglon generate`: continue a prompt with a trained network."""

import sys
from typing import Annotated

import typer

from launch import runtime
from launch.trained import (
    DeviceOption,
    PositionOption,
    RunOrCheckpoint,
    end_tokens,
    evaluation_position,
    new_tokens,
    open_checkpoint,
    open_tokenizer,
)
from model.generate import Sampling, generate
from trainer.printable import printable


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
    Sampling(temperature, top_k, top_p, seed)  # refuses wrong values before weights are read
    trained = open_checkpoint(checkpoint, runtime.choose_device(device, runtime.world()))
    vocabulary = open_tokenizer(trained, tokenizer)
    sampling, ends = Sampling(temperature, top_k, top_p, seed, vocabulary.unused_ids()), end_tokens(trained, vocabulary)
    ids = vocabulary.prompt(prompt)
    evaluated = evaluation_position(trained, position)
    count = new_tokens(trained.config, evaluated, len(ids), tokens)
    sys.stdout.write(prompt)
    sampled: list[int] = []
    text = shown = ""
    readable = printable if sys.stdout.isatty() else str  # a file or a pipe gets the text as it is
    for step in generate(trained.decoder, [ids], count, sampling, ends, evaluated, vocabulary.vocab_size):
        sampled.extend(token for token in step if token is not None and token not in ends)
        text = vocabulary.continuation(ids, sampled)
        if not text.endswith("\ufffd"):  # the first bytes of a character are held back until it is complete
            sys.stdout.write(readable(text[len(shown) :]))
            sys.stdout.flush()
            shown = text
    sys.stdout.write(readable(text[len(shown) :]) + "\n")
