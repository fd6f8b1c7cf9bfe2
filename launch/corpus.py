"""Commands of the data room: tokenizer, prepare, audit."""

from enum import StrEnum
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from data import prepare as preparation
from data.prepare import prepare
from data.sources import Reading
from data.tokenizer import train_tokenizer

tokenizer_app = typer.Typer(no_args_is_help=True, help="Make a tokenizer.")


class Model(StrEnum):
    """Kinds of sentencepiece model."""

    unigram = "unigram"
    bpe = "bpe"


class TextDocuments(StrEnum):
    """What a document of a plain-text file is."""

    file = "file"
    line = "line"
    paragraph = "paragraph"


class OnError(StrEnum):
    """What happens at a document that cannot be read."""

    stop = "stop"
    skip = "skip"


Inputs = Annotated[list[str], typer.Argument(help="Files, folders, patterns or s3:// and gs:// addresses.")]
FieldName = Annotated[str, typer.Option("--field", help="Parquet column or JSON field that holds the text.")]
Documents = Annotated[TextDocuments, typer.Option(help="A document of plain text.")]
Errors = Annotated[OnError, typer.Option(help="At a document that cannot be read.")]
MaxBytes = Annotated[int, typer.Option(help="Longest document (bytes).")]


@tokenizer_app.command("train")
def tokenizer_train(
    inputs: Inputs,
    output: Annotated[str, typer.Option(help="Directory to write.")],
    vocab_size: Annotated[int, typer.Option(help="Pieces, the 256 bytes among them.")] = 32_000,
    model: Annotated[Model, typer.Option(help="Kind of model.")] = Model.unigram,
    sample_bytes: Annotated[int, typer.Option(help="Text kept in memory to train on; 0 = 500 bytes a piece.")] = 0,
    field: FieldName = "text",
    text_documents: Documents = TextDocuments.file,
    on_error: Errors = OnError.stop,
    threads: Annotated[int, typer.Option(help="Threads of the trainer.")] = 2,
) -> None:
    """Train a tokenizer that loses nothing: decode(encode(x)) == x for every text.

    Example: tiglon tokenizer train books/*.parquet --vocab-size 32000 --output tokenizer
    """
    console = Console()
    reading = Reading(field=field, text_documents=text_documents.value, on_error=on_error.value)
    with console.status("reading"):
        tokenizer = train_tokenizer(
            inputs, output, vocab_size, model.value, sample_bytes or None, reading, threads, log=console.print
        )
    console.print(f"wrote {output}: {tokenizer.vocab_size:,} pieces, fingerprint {tokenizer.fingerprint[:12]}")


def prepare_command(
    inputs: Inputs,
    tokenizer: Annotated[str, typer.Option(help="Directory of the tokenizer.")],
    output: Annotated[str, typer.Option(help="Directory to write: train/ and validation/.")],
    workers: Annotated[int, typer.Option(help="Processes.")] = 1,
    validation_fraction: Annotated[float, typer.Option(help="Share of the documents held out; 0 = none.")] = 0.005,
    field: FieldName = "text",
    text_documents: Documents = TextDocuments.file,
    on_error: Errors = OnError.stop,
    max_document_bytes: MaxBytes = 64 << 20,
    deduplicate: Annotated[bool, typer.Option("--deduplicate", help="Keep the first of equal documents.")] = False,
    sampling_alpha: Annotated[float, typer.Option(help="Draw segmentations with P ~ exp(alpha * score); 0 = the best.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    task_bytes: Annotated[int, typer.Option(help="Input of a shard; 0 = a 64th, 1 to 256 MiB.")] = 0,
) -> None:
    """Turn text into token shards. Started again after a kill, it goes on where it was.

    Example: tiglon prepare books/*.parquet --tokenizer tokenizer --output corpus --workers 8
    """
    console = Console()
    reading = Reading(field, text_documents.value, on_error.value, max_document_bytes)
    columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("starting", total=None)

        def show(now: preparation.Progress) -> None:
            read = now.done_bytes / 1e6
            speed = f"{read:,.0f} MB, {read / max(now.seconds, 1e-9):,.1f} MB/s, {now.tokens:,} tokens"
            bar.update(task, total=now.bytes, completed=now.done_bytes, description=speed)

        manifests = prepare(
            inputs, tokenizer, output, workers, validation_fraction, reading, deduplicate, sampling_alpha, seed,
            task_bytes or None, show,
        )  # fmt: skip
    counts = manifests["train"].counts
    console.print(f"{counts['documents']:,} documents, {counts['bytes'] / max(counts['tokens'], 1):.2f} bytes a token")
    for part, manifest in manifests.items():
        console.print(f"wrote {output}/{part}: {manifest.counts['part_tokens']:,} tokens in {len(manifest.shards):,} shards")
    for reason, count in sorted(counts["left_out"].items()):
        console.print(f"left out {count:,} documents: {reason}")
