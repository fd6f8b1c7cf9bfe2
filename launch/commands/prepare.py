"""`tiglon prepare`: tokenize text into shards."""

from collections.abc import Callable
from functools import partial
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from data.corpus.shards import CorpusManifest
from data.ingest.prepare import Prepared, PrepareProgress, prepare
from data.ingest.tasks import PrepareOptions
from data.text.formats import left_out_remark
from launch.commands.text_options import (
    EncodingOption,
    FieldOption,
    InputsArgument,
    MaxDocumentBytesOption,
    OnErrorChoice,
    OnErrorOption,
    TextDocumentsChoice,
    TextDocumentsOption,
    not_empty,
    text_format,
)
from launch.terminal import terminal
from trainer.monitoring.progress import format_bytes, format_duration, plural


def prepare_command(
    inputs: InputsArgument,
    tokenizer: Annotated[str, typer.Option(help="Directory of the tokenizer.", callback=not_empty)],
    output: Annotated[str, typer.Option(help="Directory to write; gets train/ and validation/.", callback=not_empty)],
    workers: Annotated[int, typer.Option(help="Processes.")] = 1,
    validation_fraction: Annotated[float, typer.Option(help="Share held out; 0 = none.")] = 0.005,
    field: FieldOption = None,
    text_documents: TextDocumentsOption = TextDocumentsChoice.file,
    on_error: OnErrorOption = OnErrorChoice.stop,
    max_document_bytes: MaxDocumentBytesOption = 64 << 20,
    encoding: EncodingOption = "utf-8",
    deduplicate: Annotated[bool, typer.Option("--deduplicate", help="Keep the first of equal documents.")] = False,
    sampling_alpha: Annotated[
        float, typer.Option(help="Sample segmentations with P ~ exp(alpha * score); 0 = the best.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    task_bytes: Annotated[int, typer.Option(help="Input bytes per shard; 0 = a 64th of the input, 1 to 256 MiB.")] = 0,
) -> None:
    """Tokenize text into shards. An interrupted command resumes where it stopped.

    Example: tiglon prepare books/*.parquet --tokenizer tokenizer --output corpus --workers 8
    """
    console = terminal()
    form = text_format(field, text_documents, on_error, max_document_bytes, encoding)
    options = PrepareOptions(validation_fraction, form, deduplicate, sampling_alpha, seed)
    with Progress(BarColumn(), TextColumn("{task.description}"), console=console) as bar:
        prepared = _with_bar(bar, partial(prepare, inputs, tokenizer, output, options, workers, task_bytes or None))
    _print_summary(console, output, prepared)


def _with_bar(bar: Progress, start: Callable[..., Prepared]) -> Prepared:
    """Start a preparation and show how far it is; what is refused, or was done before, leaves no bar."""
    task = bar.add_task("reading", total=None)

    def show(now: PrepareProgress | str) -> None:
        if isinstance(now, str):
            bar.console.print(now, markup=False, highlight=False)
        else:
            bar.update(task, total=now.bytes, completed=now.done_bytes, description=_progress_text(now))

    worked = False
    try:
        prepared = start(show)
        worked = prepared.tasks_before < prepared.tasks
    finally:
        if not worked:
            bar.remove_task(task)
    return prepared


def _progress_text(now: PrepareProgress) -> str:
    speed = format_bytes(now.done_bytes / max(now.seconds, 1e-9))
    done = now.done_bytes >= now.bytes
    time = f"in {format_duration(now.seconds)}" if done else f"ETA {format_duration(now.remaining_seconds)}"
    return f"{format_bytes(now.done_bytes)}, {speed}/s, {plural(now.tokens, 'token')}, {time}"


def _print_summary(console: Console, output: str, prepared: Prepared) -> None:
    counts = prepared.manifests["train"].counts
    density = f"{format_bytes(counts['bytes'])} of text, {counts['bytes'] / max(counts['tokens'], 1):.2f} bytes per token"
    console.print(f"{plural(counts['documents'], 'document')}, {density}")
    if remark := left_out_remark({**counts["left_out"], "equal to an earlier one": counts.get("duplicates", 0)}):
        console.print(remark, markup=False, highlight=False)
    if prepared.tasks_before == prepared.tasks:
        console.print(f"nothing to do: '{output}' was prepared of this very input before", markup=False)
    print_written(console, output, prepared.manifests, "has" if prepared.tasks_before == prepared.tasks else "wrote")
    if not all(manifest.shards for manifest in prepared.manifests.values()):
        console.print("a split has no document: choose another --validation-fraction, or train without data.validation")


def print_written(console: Console, output: str, manifests: dict[str, CorpusManifest], verb: str = "wrote") -> None:
    """Print what was written: a line for each split, with its tokens and shards."""
    for split, manifest in manifests.items():
        tokens = format_tokens(manifest.counts["part_tokens"], len(manifest.shards))
        console.print(f"{verb} {output}/{split}: {tokens}", markup=False)


def format_tokens(tokens: int, shards: int) -> str:
    """ "1,234 tokens in 2 shards"."""
    return f"{plural(tokens, 'token')} in {plural(shards, 'shard')}"
