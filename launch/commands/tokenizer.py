"""`tiglon tokenizer train` and `tiglon tokenizer import`."""

from enum import StrEnum
from functools import partial
from typing import Annotated

import typer
from rich.table import Table

from data.text.sampling import text_density
from data.tokenizer.import_model import import_tokenizer
from data.tokenizer.train import TokenizerBudget, train_tokenizer
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
from trainer.monitoring.progress import format_bytes

tokenizer_app = typer.Typer(add_completion=False, no_args_is_help=True, help="Train or import a tokenizer.")


class ModelOption(StrEnum):
    """Kind of sentencepiece model."""

    unigram = "unigram"
    bpe = "bpe"


@tokenizer_app.command("train")
def tokenizer_train(
    inputs: InputsArgument,
    output: Annotated[str, typer.Option(help="Directory to write.", callback=not_empty)],
    vocab_size: Annotated[int, typer.Option(help="Pieces, the 256 bytes among them.")] = 32_000,
    model: Annotated[ModelOption, typer.Option(help="Kind of model.")] = ModelOption.unigram,
    sample_bytes: Annotated[int, typer.Option(help="Text kept in memory to train on; 0 = 500 bytes per piece.")] = 0,
    field: FieldOption = None,
    text_documents: TextDocumentsOption = TextDocumentsChoice.file,
    on_error: OnErrorOption = OnErrorChoice.stop,
    max_document_bytes: MaxDocumentBytesOption = 64 << 20,
    encoding: EncodingOption = "utf-8",
    threads: Annotated[int, typer.Option(help="Threads of the trainer.")] = 2,
) -> None:
    """Train a lossless tokenizer: decode(encode(x)) == x for every text.

    Example: tiglon tokenizer train books/*.parquet --vocab-size 32000 --output tokenizer
    """
    console = terminal()
    form = text_format(field, text_documents, on_error, max_document_bytes, encoding)
    budget = TokenizerBudget(sample_bytes or None, threads)
    with console.status("reading"):
        tokenizer = train_tokenizer(inputs, output, vocab_size, model.value, form, budget, partial(console.print, markup=False))
    console.print(f"wrote {output}: {tokenizer.vocab_size:,} pieces, fingerprint {tokenizer.fingerprint[:12]}")
    table = Table("source", "documents", "text", "bytes per token")
    for address in inputs:
        density = text_density(tokenizer, address, form)
        sampled = "" if density.whole else " sampled"
        table.add_row(
            address, f"{density.documents:,}{sampled}", format_bytes(density.bytes) + sampled, f"{density.bytes_per_token:.2f}"
        )
    console.print(table)


@tokenizer_app.command("import")
def tokenizer_import(
    source: Annotated[
        str,
        typer.Argument(help="A sentencepiece .model, a Hugging Face tokenizer.json, or the folder of one.", callback=not_empty),
    ],
    output: Annotated[str, typer.Option(help="Directory to write.", callback=not_empty)],
    end_of_text: Annotated[str, typer.Option(help="Piece that separates documents; default: the one it names.")] = "",
    begin_of_text: Annotated[
        str, typer.Option(help="Piece that begins each document, or none; default: what the tokenizer itself puts in front.")
    ] = "",
) -> None:
    """Import an existing tokenizer.

    Example: tiglon tokenizer import Llama/tokenizer.json --output tokenizer
    """
    tokenizer = import_tokenizer(source, output, end_of_text, begin_of_text)
    console = terminal()
    begins = "" if tokenizer.begin_of_text is None else f", beginning {tokenizer.begin_of_text}"
    console.print(f"wrote {output}: {tokenizer.vocab_size:,} pieces, separator {tokenizer.end_of_text}{begins}")
    if not tokenizer.description.lossless:
        console.print("this tokenizer is not lossless: decoding changes some spaces, control characters or rare letters")
