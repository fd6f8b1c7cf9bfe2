"""`tiglon data import` and `tiglon data audit`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from data.corpus.audit import CorpusReport, audit_corpus, audit_plan, decoded_samples
from data.corpus.stream import Stream
from data.ingest.megatron import import_megatron
from data.text.formats import left_out_remark
from data.tokenizer.tokenizer import Tokenizer
from launch.batches import batch_sizes, total_batches
from launch.commands.configured import load_told
from launch.commands.prepare import format_tokens, print_written
from launch.commands.text_options import not_empty
from launch.config import RunConfig
from launch.inputs import batch_shape
from launch.plots.mixture import draw_mixture
from launch.preflight import Preflight, begin_run
from launch.resume import CONFIG_FILE, other_past
from launch.runtime import ALONE
from launch.shipped import is_shipped
from launch.terminal import terminal
from trainer.config import TrainConfig
from trainer.monitoring.progress import plural
from trainer.state import State

MOST_SAMPLES = 10_000
"""Excerpts of a corpus: a person looks at them."""
data_app = typer.Typer(add_completion=False, no_args_is_help=True, help="Import or audit prepared shards.")


@data_app.command("import")
def import_megatron_command(
    prefix: Annotated[str, typer.Argument(help="Megatron dataset: PREFIX.bin and PREFIX.idx.", callback=not_empty)],
    tokenizer: Annotated[str, typer.Option(help="Directory of the tokenizer it was made with.", callback=not_empty)],
    output: Annotated[str, typer.Option(help="Directory to write; gets train/ and validation/.", callback=not_empty)],
    validation_fraction: Annotated[float, typer.Option(help="Share held out; 0 = none.")] = 0.005,
) -> None:
    """Convert a Megatron dataset to shards.

    Example: tiglon data import wiki_text_document --tokenizer tokenizer --output corpus
    """
    console, manifests = terminal(), import_megatron(prefix, tokenizer, output, validation_fraction)
    if remark := left_out_remark(manifests["train"].counts["left_out"]):
        console.print(remark, highlight=False)
    print_written(console, output, manifests)


@data_app.command("audit")
def audit_command(
    target: Annotated[str, typer.Argument(help="Prepared shards, a run, or the configuration of one.", callback=not_empty)],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value ... of the run.")] = None,
    tokenizer: Annotated[str, typer.Option(help="Tokenizer to decode samples with; a run names its own.")] = "",
    samples: Annotated[int, typer.Option(help="Excerpts to decode and show.")] = 3,
    picture: Annotated[str, typer.Option(help="Write the mixture over the run's steps to this .png or .svg.")] = "",
) -> None:
    """Verify shards, and that a run reads every token equally often. Exit status 1 if not.

    Example: tiglon data audit quickstart --picture mixture.png
    """
    if not 0 <= samples <= MOST_SAMPLES:
        raise ValueError(f"--samples {samples}: give 0 to {MOST_SAMPLES:,}")
    console = terminal()
    run = target if (Path(target) / CONFIG_FILE).is_file() else ""
    of_run = run or target.endswith(".toml") or (is_shipped(target) and not Path(target).is_dir())
    if picture and not of_run:
        raise ValueError("--picture draws the mixture of a run: give the run or its TOML file, not prepared shards")
    begun = _begin(run, target, overrides) if of_run else None
    config = begun.config if begun else None
    directories = [target] if config is None else _directories(config)
    tokenizer = tokenizer or (config.data.tokenizer if config else "")
    intact = True
    for directory in directories:
        report = audit_corpus(directory)
        intact &= not report.faults
        _print_report(console, report)
        if tokenizer and samples:
            for text in decoded_samples(directory, Tokenizer.load(tokenizer), samples):
                console.print("  ... " + repr(text), markup=False, highlight=False)
    if begun is not None:
        intact &= _audit_run(console, begun, picture)
        intact &= _audit_past(console, begun, run)
    if not intact:
        raise typer.Exit(1)


def _begin(run: str, target: str, overrides: list[str] | None) -> Preflight:
    """The run as `tiglon train` would begin it: from its newest checkpoint, if it has one."""
    config = load_told(f"{run}/{CONFIG_FILE}" if run else target, overrides)
    if run:  # wherever it lies now, and even if another start of it would begin anew
        resume = "auto" if config.checkpoint.resume == "never" else config.checkpoint.resume
        here = {
            "run": config.run.model_copy(update={"dir": run}),
            "checkpoint": config.checkpoint.model_copy(update={"resume": resume}),
        }
        config = config.model_copy(update=here)
    return begin_run(config, ALONE)


def _directories(config: RunConfig) -> list[str]:
    sources = config.data.sources("train") + config.data.sources("validation")
    sources += [source for phase in config.data.curriculum for source in phase.sources]
    return list(dict.fromkeys(source.path for source in sources))


def _print_report(console: Console, report: CorpusReport) -> None:
    manifest = report.manifest
    tokens, documents = (sum(getattr(shard, key) for shard in manifest.shards) for key in ("tokens", "documents"))
    console.print(
        f"{report.directory}: {plural(documents, 'document')}, {format_tokens(tokens, len(manifest.shards))}", markup=False
    )
    if manifest.shards:
        _print_lengths(console, report)
    else:
        console.print("  it holds no document, so no run can read it: prepare with another --validation-fraction")
    for fault in report.faults:
        console.print(f"  FAULT {fault}", markup=False)
    if manifest.shards and not report.faults:
        console.print("  every shard has the size, checksum, boundaries and tokens its manifest states", highlight=False)


def _print_lengths(console: Console, report: CorpusReport) -> None:
    most = max(report.lengths.values(), default=1)
    for power, documents in sorted(report.lengths.items()):
        bar = "#" * -(-24 * documents // most)
        console.print(f"  {1 << power:>9,} to {(2 << power) - 1:>9,} tokens {documents:>11,} {bar}", highlight=False)
    console.print(
        f"  nearly empty (below 8 tokens) {report.near_empty:,}, over-long (above 2**20) {report.over_long:,},"
        f" longest {report.longest:,}", highlight=False
    )  # fmt: skip


def _audit_past(console: Console, begun: Preflight, run: str) -> bool:
    """Compare the plan of a run with that of the checkpoint it resumes from, up to there."""
    config, path, fault = begun.config, begun.path, ""
    if begun.manifest is None or begun.weights_only:
        verdict = f"{run} has no checkpoint yet: nothing that was trained to compare with the plan" if run else ""
    else:
        stream = Stream(config.data, "train", batch_shape(config.train, begun.state.batch), 0, 1, config.run.seed)
        try:
            fault = other_past(stream, begun.manifest.meta, config)
        finally:
            stream.close()
        trained = f"{path}, step {begun.state.step}, was trained by this plan{_left_behind(config.train, begun.state)}"
        verdict = f"FAULT {path} was trained otherwise: {fault}" if fault else trained
    if verdict:
        console.print(verdict, markup=False, highlight=False, soft_wrap=True)
    return not fault


def _left_behind(train: TrainConfig, state: State) -> str:
    """Which part of what a plan reads before a state was never trained on."""
    batches, samples = state.batch - state.step, batch_sizes(train).before(state.batch) - state.tokens // train.sequence_length
    if not batches:
        return ""
    return (
        f", but for {plural(batches, 'batch', 'batches')} ({plural(samples, 'sample')}) of the {state.batch:,} it read, which "
        "rewinds left behind"
    )


def _audit_run(console: Console, begun: Preflight, picture: str) -> bool:
    config, train = begun.config, begun.config.train
    batches = total_batches(train, begun.state)
    coverage, draws = audit_plan(config.data, train.sequence_length, batch_sizes(train), batches, config.run.seed)
    padded = ["padding"] if config.data.pack == "documents" else []
    table = Table("corpus", "tokens", "samples read", "epochs", *padded, "each token read", "verdict")
    for item in coverage:
        times = f"{item.least}" if item.least == item.most else f"{item.least} or {item.most} times"
        verdict = "exact" if item.exact else "NOT EXACT"
        counts = f"{item.tokens:,}", f"{item.drawn:,}", f"{item.drawn / item.samples:.3f}"
        table.add_row(item.directory, *counts, *(f"{item.padding:.2%}" for _ in padded), times, verdict)
    console.print(table)
    if picture:
        draw_mixture(picture, [item.directory for item in coverage], draws, batches)
        console.print(f"wrote {picture}")
    return all(item.exact for item in coverage)
