"""Commands of the data room: tokenizer train and import, prepare, data import and audit."""

from enum import StrEnum
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from data import prepare as preparation
from data.audit import CorpusReport, audit_corpus, audit_plan, decoded_samples
from data.foreign import import_megatron, import_tokenizer
from data.prepare import prepare
from data.sampling import density
from data.shards import Manifest
from data.sources import Reading
from data.tokenizer import Tokenizer, train_tokenizer
from launch.config import RunConfig, load
from launch.mixture_picture import draw_mixture
from trainer.progress import plural, size

tokenizer_app = typer.Typer(add_completion=False, no_args_is_help=True, help="Make a tokenizer.")
data_app = typer.Typer(add_completion=False, no_args_is_help=True, help="Look into prepared shards.")


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
Documents = Annotated[TextDocuments, typer.Option(metavar="<kind>", help="Document: file, line, paragraph.")]
Errors = Annotated[OnError, typer.Option(metavar="<act>", help="Unreadable document: stop, skip.")]
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
    table = Table("source", "documents", "text", "bytes per token")
    for address in inputs:
        found = density(tokenizer, address, reading)
        sampled = "" if found.whole else " sampled"
        table.add_row(address, f"{found.documents:,}{sampled}", size(found.bytes) + sampled, f"{found.bytes_per_token:.2f}")
    console.print(table)


@tokenizer_app.command("import")
def tokenizer_import(
    source: Annotated[str, typer.Argument(help="A sentencepiece .model or a Hugging Face tokenizer.json, or its folder.")],
    output: Annotated[str, typer.Option(help="Directory to write.")],
    end_of_text: Annotated[str, typer.Option(help="Piece that separates documents; default: the one it names.")] = "",
) -> None:
    """Take over a tokenizer that others made.

    Example: tiglon tokenizer import Llama/tokenizer.json --output tokenizer
    """
    tokenizer = import_tokenizer(source, output, end_of_text)
    console = Console()
    console.print(f"wrote {output}: {tokenizer.vocab_size:,} pieces, separator {tokenizer.end_of_text}")
    if not tokenizer.description.lossless:
        console.print("this tokenizer is not lossless: some spaces, control characters or rare letters come back changed")


def prepare_command(
    inputs: Inputs,
    tokenizer: Annotated[str, typer.Option(help="Directory of the tokenizer.")],
    output: Annotated[str, typer.Option(help="Gets train/ and validation/.")],
    workers: Annotated[int, typer.Option(help="Processes.")] = 1,
    validation_fraction: Annotated[float, typer.Option(help="Share held out; 0 = none.")] = 0.005,
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
    measured = f"{size(counts['bytes'])} of text, {counts['bytes'] / max(counts['tokens'], 1):.2f} bytes per token"
    console.print(f"{plural(counts['documents'], 'document')}, {measured}")
    _say_written(console, output, manifests)
    for reason, count in sorted(counts["left_out"].items()):
        console.print(f"left out {plural(count, 'document')}: {reason}")


def _tokens_in(tokens: int, shards: int) -> str:
    return f"{plural(tokens, 'token')} in {plural(shards, 'shard')}"


def _say_written(console: Console, output: str, manifests: dict[str, Manifest]) -> None:
    for part, manifest in manifests.items():
        console.print(f"wrote {output}/{part}: {_tokens_in(manifest.counts['part_tokens'], len(manifest.shards))}")


@data_app.command("import")
def data_import(
    prefix: Annotated[str, typer.Argument(help="Megatron dataset: PREFIX.bin and PREFIX.idx.")],
    tokenizer: Annotated[str, typer.Option(help="Directory of the tokenizer that made it.")],
    output: Annotated[str, typer.Option(help="Gets train/ and validation/.")],
    validation_fraction: Annotated[float, typer.Option(help="Share held out; 0 = none.")] = 0.005,
) -> None:
    """Turn a Megatron dataset into shards.

    Example: tiglon data import wiki_text_document --tokenizer tokenizer --output corpus
    """
    _say_written(Console(), output, import_megatron(prefix, tokenizer, output, validation_fraction))


@data_app.command("audit")
def audit(
    target: Annotated[str, typer.Argument(help="Directory of prepared shards, or the TOML file of a run.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value ... of the run.")] = None,
    tokenizer: Annotated[str, typer.Option(help="Tokenizer to show samples with; a run names its own.")] = "",
    samples: Annotated[int, typer.Option(help="Places to decode and show.")] = 3,
    picture: Annotated[str, typer.Option(help="Write the mixture over the run's steps to this .png or .svg.")] = "",
) -> None:
    """Prove what shards hold, and that a run reads every token equally often. Exit status 1 if not.

    Example: tiglon data audit launch/configs/quickstart.toml --picture mixture.png
    """
    console = Console()
    config = load(target, overrides or []) if target.endswith(".toml") else None
    directories = [target] if config is None else _directories(config)
    tokenizer = tokenizer or (config.data.tokenizer if config else "")
    whole = True
    for directory in directories:
        report = audit_corpus(directory)
        whole &= not report.faults
        _print_corpus(console, report)
        if tokenizer and samples:
            for text in decoded_samples(directory, Tokenizer.load(tokenizer), samples):
                console.print("  ... " + repr(text), markup=False, highlight=False)
    if config is not None:
        whole &= _audit_run(console, config, picture)
    if not whole:
        raise typer.Exit(1)


def _directories(config: RunConfig) -> list[str]:
    sources = config.data.sources("train") + config.data.sources("validation")
    sources += [source for phase in config.data.curriculum for source in phase.sources]
    return list(dict.fromkeys(source.path for source in sources))


def _print_corpus(console: Console, report: CorpusReport) -> None:
    manifest = report.manifest
    tokens, documents = sum(s.tokens for s in manifest.shards), sum(s.documents for s in manifest.shards)
    console.print(
        f"{report.directory}: {plural(documents, 'document')}, {_tokens_in(tokens, len(manifest.shards))}", markup=False
    )
    most = max(report.lengths.values(), default=1)
    for bin_ in sorted(report.lengths):
        bar = "#" * -(-24 * report.lengths[bin_] // most)
        console.print(f"  {1 << bin_:>9,} to {(2 << bin_) - 1:>9,} tokens {report.lengths[bin_]:>11,} {bar}", highlight=False)
    console.print(
        f"  nearly empty (below 8 tokens) {report.near_empty:,}, over-long (above 2**20) {report.over_long:,},"
        f" longest {report.longest:,}", highlight=False
    )  # fmt: skip
    for fault in report.faults:
        console.print(f"  FAULT {fault}", markup=False)
    if not report.faults:
        console.print("  every shard has the size, checksum, boundaries and tokens its manifest states", highlight=False)


def _audit_run(console: Console, config: RunConfig, picture: str) -> bool:
    train = config.train
    coverage, draws = audit_plan(config.data, train.sequence_length, train.global_batch_size, train.steps, config.run.seed)
    table = Table("corpus", "tokens", "samples drawn", "epochs", "each token seen", "proof")
    for item in coverage:
        times = f"{item.least}" if item.least == item.most else f"{item.least} or {item.most} times"
        verdict = "exact" if item.exact else "NOT EXACT"
        table.add_row(item.directory, f"{item.tokens:,}", f"{item.drawn:,}", f"{item.drawn / item.samples:.3f}", times, verdict)
    console.print(table)
    if picture:
        draw_mixture(picture, [item.directory for item in coverage], draws, train.steps)
        console.print(f"wrote {picture}")
    return all(item.exact for item in coverage)
