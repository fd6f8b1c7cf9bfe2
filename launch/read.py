"""`tiglon evaluate` and `tiglon generate`: read with a trained network, with its own position map or another."""

import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from io import RawIOBase
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from data.config import DataConfig
from data.storage import naming
from data.stream import Batch
from data.tokenizer import Tokenizer
from data.validation import Validation, check_contexts
from launch import runtime
from launch.config import RunConfig, build, sentence
from launch.contexts_picture import draw_contexts
from model.config import PositionConfig
from model.decoder import Decoder
from model.generate import Sampling, generate
from model.layers import serial
from model.parallel import Topology
from model.positions import readable_length
from trainer.checkpoint import find, load, read_meta
from trainer.evaluate import Score, evaluate, evaluate_context
from trainer.metrics import FILE_NAME, bring_back, strict
from trainer.rectangles import Shard

Place = Annotated[str, typer.Argument(help="Checkpoint, or a run: its newest one.", metavar="RUN_OR_CHECKPOINT")]
Position = Annotated[str, typer.Option(help="Map to read with, as rerope,window=512; default the trained one.")]
Device = Annotated[str, typer.Option(help="auto (cuda where there is one), cpu or cuda.")]
KEPT_TOKENIZER = "tokenizer"
"""Where an imported checkpoint keeps its tokenizer."""


@dataclass(frozen=True)
class Trained:
    """A network read back from a checkpoint."""

    path: str
    step: int
    config: RunConfig
    decoder: Decoder


def open_checkpoint(place: str, device: torch.device) -> Trained:
    """The network of a checkpoint or of a run's newest one, in the numbers it was trained in.

    Raises:
        FileNotFoundError, ValueError: one sentence.
    """
    path = find(place)
    meta = read_meta(path)
    config = build(meta.config, where=f"the configuration in {path}")
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    with torch.device(device):
        decoder = Decoder(config.model, config.position, config.train.sequence_length, serial(dtype))
    shards = [
        Shard(f"weight/{name}", tuple(weight.shape), tuple(weight.shape), (0,) * weight.dim(), 0, weight.data.view(-1))
        for name, weight in decoder.named_parameters()
    ]
    load(path, shards)
    return Trained(path, meta.step, config, decoder)


def parse_position(text: str, trained: PositionConfig) -> PositionConfig:
    """A map from `kind,name=value,...`, read by a network of that trained map.

    Raises:
        ValueError: in one sentence.
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
        return PositionConfig.model_validate(trained.read_with(values))
    except ValidationError as error:
        raise ValueError(f"--position {text}: {sentence(error)}") from None


def evaluate_command(
    place: Place,
    data: Annotated[str, typer.Option(help="Prepared shards; default the run's validation part.")] = "",
    contexts: Annotated[str, typer.Option(help="Context lengths in tokens, as 512,1024,4096; default the trained one.")] = "",
    position: Position = "",
    tokens: Annotated[
        int | None, typer.Option(help="Tokens scored, each once; 0 = all of the text. Default the run's evaluate.tokens.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Directory that gets a plot and, in metrics.jsonl, the scores.")] = None,
    device: Device = "auto",
) -> None:
    """Measure held-out loss, also by context length with the same tokens scored each time.

    Example: tiglon evaluate runs/quickstart --contexts 256,512,1024 --position rerope,window=128
    """
    if tokens is not None and tokens < 0:
        raise ValueError(f"--tokens {tokens} must be 0 (all of the text) or above")
    lengths = parse_contexts(contexts)
    trained = open_checkpoint(place, runtime.choose_device(device, runtime.world()))
    how = parse_position(position, trained.config.evaluate.position or trained.config.position)
    text = open_validation(trained.config, data, lengths, tokens)
    try:
        for remark in text.remarks():
            typer.echo(remark, err=True)
        scores = list(measure(trained, text, lengths, how))
    finally:
        text.close()
    Console().print(table(scores, f"{trained.path} evaluated with {how.kind}"))
    if output is not None:
        write_scores(output, trained, position or how.kind, scores)
        typer.echo(f"wrote {output / 'metrics.jsonl'} and {output / 'contexts.png'}")


def parse_contexts(text: str) -> list[int]:
    """Context lengths, in rising order."""
    try:
        lengths = sorted(int(part) for part in text.split(",")) if text else []
    except ValueError:
        raise ValueError(f"--contexts {text} must be numbers of tokens separated by commas, as 512,1024") from None
    check_contexts(lengths, f"--contexts {text}")
    return lengths


def open_validation(config: RunConfig, data: str, contexts: list[int], tokens: int | None) -> Validation:
    """The validation text of the run, or other shards; `tokens` None: the run's budget."""
    settings = config.data.model_dump() | ({"validation": data} if data else {})
    chosen = DataConfig.model_validate(settings)
    if not chosen.sources("validation"):
        raise ValueError("the run has no data.validation; give prepared shards with --data PATH")
    budget = config.evaluate.tokens if tokens is None else tokens
    return Validation(chosen, config.train.sequence_length, config.train.micro_batch_size, contexts, budget)


def measure(trained: Trained, text: Validation, contexts: list[int], how: PositionConfig) -> Iterator[Score]:
    """One score per context, or one at the trained length, with a bar on a terminal and a line each elsewhere."""
    topology = Topology(device=trained.decoder.model.norm.weight.device)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        for context in contexts or [trained.config.train.sequence_length]:
            total = text.context_tokens if contexts else text.tokens
            said = f"context {context:,}: {total:,} tokens"
            if contexts:
                said += f" in {text.rows_at(context):,} rows"
            if not console.is_terminal:
                console.print(said, highlight=False)
            task = bar.add_task(said, total=total)
            batches = _watched(text.at(context) if contexts else text.whole(), partial(bar.advance, task))
            score_of = evaluate_context if contexts else evaluate
            yield score_of(trained.decoder, batches, topology, how)


def _watched(batches: Iterator[Batch], advance: Callable[[float], None]) -> Iterator[Batch]:
    """The batches; what was scored of one is told when the next is asked for."""
    for batch in batches:
        yield batch
        advance(int((batch.targets_BS >= 0).sum()))


def table(scores: list[Score], title: str) -> Table:
    """Scores as a table, a row for each context."""
    found = Table("context", "tokens", "loss (nats)", "standard error", "perplexity", title=title)
    for score in scores:
        error = "" if score.standard_error is None else f"{score.standard_error:.4f}"
        perplexity = f"{math.exp(score.loss):.2f}" if score.loss < 700 else "inf"  # exp of more is no float
        cells = (f"{score.context:,}", f"{score.tokens:,}", f"{score.loss:.4f}", error, perplexity)
        found.add_row(*cells)
    return found


def write_scores(output: Path, trained: Trained, name: str, scores: list[Score]) -> None:
    """Records added to a metrics.jsonl as a run has it (those that are there stay), and the curve."""
    append(output / FILE_NAME, [score.record(trained.step, name) | {"checkpoint": trained.path} for score in scores])
    curve = [(score.context, score.loss) for score in scores]
    draw_contexts(output / "contexts.png", {name: curve}, trained.config.train.sequence_length)


def append(path: Path, records: list[dict[str, Any]]) -> None:
    """Add records at the end of a metrics.jsonl, which a run may be writing to at this moment: the file stays the same one,
    and every record in it. Only a last line that a kill has torn, which is none, makes room.

    Raises:
        OSError: it cannot be written; nothing is added.
    """
    lines = b"".join(json.dumps(strict(record), ensure_ascii=False, allow_nan=False).encode() + b"\n" for record in records)
    with naming(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        bring_back(path)
        with open(path, "ab+", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            tail = _after_last_newline(file, end)
            if tail and _is_record(tail):
                lines = b"\n" + lines
            elif tail:
                end -= len(tail)
                file.truncate(end)
            written = 0
            try:
                while written < len(lines):
                    written += file.write(lines[written:])
            except OSError:
                if os.fstat(file.fileno()).st_size == end + written:  # else a run has written since
                    file.truncate(end)
                raise


def _after_last_newline(file: RawIOBase, end: int) -> bytes:
    size = 1 << 16
    while True:
        file.seek(max(0, end - size))
        found = file.read(size) or b""
        if b"\n" in found or size >= end:
            return found.rpartition(b"\n")[2]
        size *= 16


def _is_record(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def generate_command(
    place: Place,
    prompt: Annotated[str, typer.Option(help="Text to continue; empty begins a document.")] = "",
    tokens: Annotated[int, typer.Option(help="Most tokens to add; 0 = up to 200, as far as the map reads.")] = 0,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Only the k likeliest tokens; 0 = all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Only the likeliest tokens that hold this probability.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Of the drawing.")] = 0,
    position: Position = "",
    tokenizer: Annotated[str, typer.Option(help="Tokenizer directory; default the run's own.")] = "",
    device: Device = "auto",
) -> None:
    """Continue a text; pieces appear as they are made.

    Example: tiglon generate runs/quickstart --prompt "def main(" --tokens 100
    """
    sampling = Sampling(temperature, top_k, top_p, seed)
    trained = open_checkpoint(place, runtime.choose_device(device, runtime.world()))
    words = Tokenizer.load(tokenizer or _own_tokenizer(trained))
    ids = [words.end_of_text, *words.encode(prompt)]
    how = parse_position(position, trained.config.evaluate.position or trained.config.position)
    count = new_tokens(trained.config, how, len(ids), tokens)
    sys.stdout.write(prompt)
    made: list[int] = []
    text = shown = ""
    for step in generate(trained.decoder, [ids], count, sampling, words.end_of_text, how, words.vocab_size):
        made.extend(token for token in step if token is not None and token != words.end_of_text)
        text = words.decode(made)
        if not text.endswith("\ufffd"):  # the first bytes of a character are held back until it is whole
            sys.stdout.write(text[len(shown) :])
            sys.stdout.flush()
            shown = text
    sys.stdout.write(text[len(shown) :] + "\n")


def _own_tokenizer(trained: Trained) -> str:
    kept = Path(trained.path) / KEPT_TOKENIZER
    own = str(kept) if kept.is_dir() else trained.config.data.tokenizer
    if not own:
        raise ValueError(f"{trained.path} names no tokenizer; give one with --tokenizer DIR")
    return own


def new_tokens(config: RunConfig, how: PositionConfig, prompt: int, asked: int) -> int:
    """How many tokens to add to a prompt of `prompt` tokens.

    Raises:
        ValueError: the text would grow longer than the map can read.
    """
    if asked < 0:
        raise ValueError(f"--tokens {asked} must be 0 (as many as the map reads, up to 200) or above")
    length = config.train.sequence_length
    limit = readable_length(how, config.position, length)
    if limit is not None and prompt + max(asked, 1) > limit:
        raise ValueError(
            f"a prompt of {prompt} tokens and {max(asked, 1)} new ones go beyond the {limit} that a model trained at {length} "
            f"reads with position '{how.kind}'; shorten them or read with --position rerope,window={max(1, length // 4)}"
        )
    if asked:
        return asked
    return 200 if limit is None else min(200, limit - prompt)
