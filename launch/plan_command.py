"""`tiglon plan`: the plan as tables on the screen, or as JSON."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from data.shards import read_manifest
from launch.config import RunConfig, load
from launch.memory import Memory
from launch.plan import Candidate, Plan, plan
from trainer.progress import plural, size


def plan_command(
    config_path: Annotated[Path, typer.Argument(metavar="CONFIG", help="TOML configuration of the run.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[section.key=value]...", help="Changes to it.")] = None,
    gpus: Annotated[int | None, typer.Option("--gpus", help="Ranks in all. Default 8, or 2 for --gpu cpu.")] = None,
    gpu: Annotated[str, typer.Option("--gpu", help="h100, h200, b200, a100, a100-40, l40s, rtx4090 or cpu.")] = "h100",
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Memory, operations, communication and days of a run, before anything is bought or queued.

    Example: tiglon plan launch/configs/llama-8b.toml --gpus 64 --gpu h200
    """
    config = load(config_path, overrides or [])
    made = plan(config, gpus if gpus is not None else 2 if gpu == "cpu" else 8, gpu, count_tokens(config))
    if as_json:
        print(json.dumps(made.as_dict(), indent=1, allow_nan=False))
    else:
        show(made, config, Console())


def count_tokens(config: RunConfig) -> dict[str, int]:
    """Tokens of each training source whose manifest is there; the others are left out."""
    sources = list(config.data.sources("train"))
    sources += [source for phase in config.data.curriculum for source in phase.sources]
    found = {}
    for path in {source.path for source in sources}:
        try:
            found[path] = sum(shard.tokens for shard in read_manifest(path).shards)
        except (FileNotFoundError, ValueError):
            continue  # not prepared yet: the plan says so
    return found


def show(made: Plan, config: RunConfig, console: Console) -> None:
    """Print a plan."""
    _show_model(made, console)
    _show_batch(made, config, console)
    _show_memory(made, console)
    if made.configured:
        _show_step(made.configured, made, console)
    if made.problem:
        console.print(f"[bold red]As configured it cannot run on {made.gpus} x {made.gpu.name}[/]: {made.problem}")
    _show_layouts(made, console)
    console.print(
        "[dim]Times are predictions from data sheets and the assumptions in launch/predict.py, within about 20 % of "
        "published runs (docs/results/plan.md).[/]"
    )


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0), pad_edge=False, title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    return table


def _show_model(made: Plan, console: Console) -> None:
    table = _table("Parameters", [*made.parameters])
    table.add_row(*(_count(value) for value in made.parameters.values()))
    console.print(table)
    flops = made.flops_per_token
    console.print(
        f"{flops['causal'] / 1e9:.3g} GFLOP per token (attention counted causally), {flops['full'] / 1e9:.3g} counted in full\n"
    )


def _show_batch(made: Plan, config: RunConfig, console: Console) -> None:
    batch, train = made.batch, config.train
    counts = [int(batch.get(key, 0)) for key in ("data_parallel_ranks", "micro_batches_a_rank")]
    whole = f"{plural(train.global_batch_size, 'sequence')} x {train.sequence_length}"
    console.print(f"[bold]Batch[/]: {whole} = {_count(batch['tokens_an_update'])} tokens per update")
    if all(counts):
        console.print(
            f"  = {plural(counts[0], 'data-parallel rank')} x {plural(counts[1], 'micro-batch', 'micro-batches')} x "
            f"{plural(train.micro_batch_size, 'sequence')}"
        )
    console.print(
        f"  {plural(train.steps, 'update')} read {_count(batch['tokens_in_all'])} tokens, "
        f"{batch['tokens_a_parameter']:.3g} per parameter"
    )
    for source in made.coverage:
        known = "not prepared yet" if source.tokens is None else f"{_count(source.tokens)} there: {source.epochs:.2f} epochs"
        console.print(f"  {source.path}: {_count(source.tokens_wanted)} tokens wanted, {known}")
    console.print()


def _show_memory(made: Plan, console: Console) -> None:
    kinds = list(Memory.__dataclass_fields__)
    scale, unit = (1e9, "GB") if max(held.peak for _, held in made.engines) >= 1e9 else (1e6, "MB")
    short = {"activations": "activ.", "gradients": "grads"}
    heads = [short.get(kind, kind) for kind in kinds]
    table = _table(f"{unit} per rank, at the configured tensor-parallel size and micro-batch", ["", *heads])
    for name, held in made.engines:
        numbers = [getattr(held, kind) for kind in kinds]
        table.add_row(name, *(f"{number / scale:.2f}" if number else "-" for number in numbers))
    console.print(table, "")


def _show_step(candidate: Candidate, made: Plan, console: Console) -> None:
    step = candidate.step
    table = _table(
        f"A step as configured ({candidate.layout.name}) on {made.gpus} x {made.gpu.name}",
        ["part", "seconds", "bytes per rank", "link"],
    )
    for name in ("matrices", "attention", "pointwise", "optimizer"):
        table.add_row(name, _seconds(getattr(step, name)), "", "")
    for part in step.traffic:
        behind = ", hidden" if part.hidden else ""
        table.add_row(part.what, _seconds(part.seconds), _bytes(part.bytes), part.link + behind)
    table.add_row("communication not hidden", _seconds(step.exposed), "", "")
    table.add_row("[bold]in all[/]", f"[bold]{_seconds(step.seconds)}[/]", "", "")
    console.print(table)
    console.print(
        f"{step.tokens_per_second_per_gpu:,.0f} tokens/s per rank, MFU {candidate.mfu:.1%} causal, "
        f"[bold]{_days(candidate.days)}[/] to {_count(made.batch['tokens_in_all'])} tokens\n"
    )


def _show_layouts(made: Plan, console: Console) -> None:
    title = f"Layouts of {made.gpus} x {made.gpu.name} that fit, fastest first (tensor x data ranks, micro-batch x count)"
    table = _table(title, ["", "micro", "recompute", "memory", "step s", "tok/s per rank", "MFU", "time"])
    for candidate in made.ranked:
        layout, step = candidate.layout, candidate.step
        table.add_row(
            layout.name, f"{layout.micro_batch_size}x{layout.micro_batches}", layout.recompute,
            _bytes(candidate.memory.peak), _seconds(step.seconds), f"{step.tokens_per_second_per_gpu:,.0f}",
            f"{candidate.mfu:.1%}", _days(candidate.days),
        )  # fmt: skip
    console.print(table)
    for refusal in made.refused:
        console.print(f"[yellow]not {refusal.name}[/]: {refusal.reason}")


def _count(number: float) -> str:
    """In four digits: 950, 12.34k, 8.03B."""
    for scale, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= 0.99995 * scale:  # from there on the smaller unit would show 1000
            return f"{number / scale:.4g}{letter}"
    return f"{number:.4g}"


def _bytes(number: float) -> str:
    return size(number) if number else "-"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g}" if seconds < 999.5 else f"{seconds:,.0f}"


def _days(days: float) -> str:
    if days >= 1:
        return f"{days:.1f} days"
    return f"{days * 24:.1f} hours" if days * 24 >= 1 else f"{days * 1440:.1f} minutes"
