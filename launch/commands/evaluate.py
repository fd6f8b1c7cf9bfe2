"""`tiglon evaluate`: held-out loss of a trained network, with its own position map or another."""

import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from io import RawIOBase
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress
from rich.table import Table

from data.corpus.validation import Validation, check_contexts
from data.storage import named_errors, replace_file
from launch import runtime
from launch.long_contexts import check_contexts_alone, forwards_at
from launch.plots.contexts import draw_contexts
from launch.terminal import terminal
from launch.trained import (
    DeviceOption,
    PositionOption,
    RunOrCheckpoint,
    Trained,
    check_chunk_tokens,
    evaluation_position,
    open_checkpoint,
    open_validation,
    with_chunks,
)
from model.parallel.mesh import Mesh
from model.positions.config import PositionConfig
from trainer.evaluate import Score, evaluate, evaluate_context
from trainer.monitoring.evaluation_progress import EvaluationProgress
from trainer.monitoring.jsonl import rescue_records
from trainer.monitoring.progress import format_perplexity, plural
from trainer.monitoring.records import FILE_NAME, json_safe


def evaluate_command(
    checkpoint: RunOrCheckpoint,
    data: Annotated[str, typer.Option(help="Prepared shards; default the run's data.validation.")] = "",
    contexts: Annotated[str, typer.Option(help="Context lengths in tokens, as 512,1024,4096; default the trained one.")] = "",
    position: PositionOption = "",
    tokens: Annotated[
        int | None, typer.Option(help="Tokens scored, each once; 0 = all of the text. Default the run's evaluate.tokens.")
    ] = None,
    chunk_tokens: Annotated[
        int | None,
        typer.Option(help="Longer rows pass through the network in chunks of so many tokens; 0 = whole. Default the run's."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Directory to add scores to (metrics.jsonl) and plot in.")] = None,
    device: DeviceOption = "auto",
) -> None:
    """Measure held-out loss; with --contexts at several context lengths, on the same tokens each time.

    Example: tiglon evaluate runs/quickstart --contexts 256,512,1024 --position rerope,window=128
    """
    if tokens is not None and tokens < 0:
        raise ValueError(f"--tokens {tokens} must be 0 (all of the text) or above")
    check_chunk_tokens(chunk_tokens)  # before a checkpoint is read
    lengths, world = parse_contexts(contexts), runtime.world()
    chosen = runtime.choose_device(device, world)
    trained = with_chunks(open_checkpoint(checkpoint, chosen), chunk_tokens)
    evaluated = evaluation_position(trained, position)
    check_contexts_alone(trained.config, lengths, evaluated, runtime.memory_capacity_bytes(chosen, world))
    text = open_validation(trained.config, data, lengths, tokens)
    try:
        for remark in text.remarks():
            typer.echo(remark, err=True)
        scores = list(measure_contexts(trained, text, lengths, evaluated))
    finally:
        text.close()
    terminal().print(score_table(scores, f"{trained.path} evaluated with {evaluated.kind}"))
    if output is not None:
        write_scores(output, trained, position or evaluated.kind, scores)
        typer.echo(f"wrote {output / 'metrics.jsonl'} and {output / 'contexts.png'}")


def parse_contexts(text: str) -> list[int]:
    """Context lengths in tokens from "512,1024", ascending.

    Raises:
        ValueError: not numbers, one twice, or one below 2 tokens.
    """
    try:
        lengths = sorted(int(part) for part in text.split(",")) if text else []
    except ValueError:
        raise ValueError(f"--contexts {text} must be numbers of tokens separated by commas, as 512,1024") from None
    check_contexts(lengths, f"--contexts {text}")
    return lengths


def measure_contexts(trained: Trained, text: Validation, contexts: list[int], evaluated: PositionConfig) -> Iterator[Score]:
    """One score per context, or one at the trained length; progress is a bar on a terminal, else a line per context, and one
    now and then where that takes long."""
    mesh, chunk = Mesh(device=trained.decoder.device), trained.config.evaluate.chunk_tokens
    console = terminal(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        for context in contexts or [trained.config.train.sequence_length]:
            total = text.context_tokens if contexts else text.tokens
            description = f"context {context:,}: {total:,} tokens"
            if contexts:
                description += f" in {plural(text.rows_at(context), 'row')}"
            forwards = forwards_at(text, context if contexts else None, chunk)
            beat: Callable[[], None]
            if console.is_terminal:
                beat = partial(bar.advance, bar.add_task(description, total=forwards))
            else:
                console.print(description, highlight=False)
                beat = EvaluationProgress(f"context {context:,}", forwards, partial(console.print, highlight=False))
            if contexts:
                yield evaluate_context(trained.decoder, text.at(context), mesh, evaluated, beat, chunk)
            else:
                yield evaluate(trained.decoder, text.whole(), mesh, evaluated, beat)


def score_table(scores: list[Score], title: str) -> Table:
    """One row per context."""
    table = Table("context", "tokens", "loss (nats)", "standard error", "perplexity", title=title)
    for score in scores:
        error = "" if score.standard_error is None else f"{score.standard_error:.4f}"
        counts = f"{score.context:,}", f"{score.tokens:,}"
        table.add_row(*counts, f"{score.loss:.4f}", error, format_perplexity(score.loss))
    return table


def write_scores(output: Path, trained: Trained, name: str, scores: list[Score]) -> None:
    """Append the scores to output/metrics.jsonl, which may be a run's own, and draw output/contexts.png."""
    append_records(output / FILE_NAME, [score.record(trained.step, name) | {"checkpoint": trained.path} for score in scores])
    curve = [(score.context, score.loss) for score in scores]
    draw_contexts(output / "contexts.png", {name: curve}, trained.config.train.sequence_length)


def append_records(path: Path, records: list[dict[str, Any]]) -> None:
    """Append records to a metrics.jsonl that a run may be writing to at this moment.

    The file is not replaced and keeps every record; only a last line that is no record, torn by a kill, is cut off.

    Raises:
        OSError: it cannot be written; nothing is added.
    """
    lines = b"".join(json.dumps(json_safe(record), ensure_ascii=False, allow_nan=False).encode() + b"\n" for record in records)
    with named_errors(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        rescue_records(path, replace_file)
        with open(path, "ab+", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            tail = _last_line(file, end)
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
                if os.fstat(file.fileno()).st_size == end + written:  # otherwise a run has written since
                    file.truncate(end)
                raise


def _last_line(file: RawIOBase, end: int) -> bytes:
    """What follows the last newline of a file of `end` bytes."""
    size = 1 << 16
    while True:
        file.seek(max(0, end - size))
        tail = file.read(size) or b""
        if b"\n" in tail or size >= end:
            return tail.rpartition(b"\n")[2]
        size *= 16


def _is_record(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False
