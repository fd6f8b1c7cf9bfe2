"""`tiglon plan`: print a plan as tables, or as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data.corpus.shards import read_corpus_manifest
from launch.batches import batch_sizes, row_lengths
from launch.commands.configured import load_begun
from launch.config import RunConfig
from launch.planner.layouts import ExpertPlan, Pipeline, Plan, make_plan
from launch.planner.memory import Memory
from launch.planner.rules import rule_lines
from launch.planner.search import Candidate
from launch.terminal import terminal
from trainer.monitoring.progress import format_bytes, plural


def plan_command(
    config_path: Annotated[Path, typer.Argument(metavar="CONFIG", help="TOML file, or a shipped one's name.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[section.key=value]...", help="Changes to it.")] = None,
    gpus: Annotated[int | None, typer.Option("--gpus", help="Total ranks. Default 8, or 2 for --gpu cpu.")] = None,
    gpu: Annotated[str, typer.Option("--gpu", help="h100, h200, b200, a100, a100-40, l40s, rtx4090 or cpu.")] = "h100",
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Predict memory, FLOPs, communication and days of a run, before anything is bought or queued.

    Example: tiglon plan llama-8b --gpus 64 --gpu h200
    """
    begun = load_begun(config_path, overrides)
    config, ranks = begun.config, gpus if gpus is not None else 2 if gpu == "cpu" else 8
    plan = make_plan(config, ranks, gpu, count_tokens(config), begun.state)
    if as_json:
        rules = [asdict(line) for line in rule_lines(config)]
        print(json.dumps(plan.as_dict() | {"rules": rules}, indent=1, allow_nan=False))
    else:
        show(plan, config, terminal(markup=True))


def count_tokens(config: RunConfig) -> dict[str, int]:
    """Path -> tokens of each training source that is prepared; the others are left out."""
    sources = list(config.data.sources("train"))
    sources += [source for phase in config.data.curriculum for source in phase.sources]
    tokens = {}
    for path in {source.path for source in sources}:
        try:
            tokens[path] = sum(shard.tokens for shard in read_corpus_manifest(path).shards)
        except (FileNotFoundError, ValueError):
            continue  # not prepared yet: the plan says so
    return tokens


def show(plan: Plan, config: RunConfig, console: Console) -> None:
    """Print a plan."""
    _show_model(plan, console)
    _show_rules(config, console)
    _show_batch(plan, config, console)
    _show_memory(plan, config, console)
    if plan.configured:
        _show_step(plan.configured, plan, config, console)
    if plan.problem:
        console.print(f"[bold red]As configured it cannot run on {plan.gpus} x {plan.gpu.name}[/]: {escape(plan.problem)}")
    _show_layouts(plan, console)
    console.print(
        "[dim]Times are predicted from data sheets and the assumptions in launch/planner/time.py. Throughput is within 20 % "
        "of all but one of the published runs in docs/results/plan.md (29 % off).[/]"
    )


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0), pad_edge=False, title_style="bold")
    for index, column in enumerate(columns):
        # where a line is too long for the screen, what is in words continues below itself; a number stays whole
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=index > 0)
    return table


def _show_model(plan: Plan, console: Console) -> None:
    told = plan.parameters if plan.parameters["experts"] else plan.parameters.keys() - {"experts", "active"}
    parameters = {name: count for name, count in plan.parameters.items() if name in told}
    table = _table("Parameters", [*parameters])
    table.add_row(*(_count(value) for value in parameters.values()))
    console.print(table)
    flops = plan.flops_per_token
    console.print(
        f"{flops['causal'] / 1e9:.3g} GFLOP per token (attention counted causally), {flops['full'] / 1e9:.3g} counted in full\n"
    )


def _show_rules(config: RunConfig, console: Console) -> None:
    table = _table("Updates", ["", "elements", "rule", "peak rate", "decay", "states"])
    for line in rule_lines(config):
        parameters = line.kind if line.pattern in ("", line.kind) else f"{line.kind} {line.pattern}"
        rate = f"{line.learning_rate:g}{f' x {line.relative_to}' if line.relative_to else ''}"
        rule = line.rule if line.rows == "all" else f"{line.rule}, {line.rows} rows"
        states = ", ".join(line.states)
        table.add_row(parameters, _count(line.elements), rule, rate, f"{line.weight_decay:g}", states)
    console.print(table, "")


def _show_batch(plan: Plan, config: RunConfig, console: Console) -> None:
    batch, train = plan.batch, config.train
    keys = ("data_parallel_ranks", "micro_batches_a_rank", "context_parallel_ranks", "pipeline_parallel_ranks")
    counts = [int(batch.get(key, 0)) for key in keys]
    ramp = f" ({batch_sizes(train).words()})" if train.batch_ramp else ""
    rows = f" in rows of {row_lengths(train).words()}" if train.length_ramp else ""
    batch_shape = f"{plural(train.global_batch_size, 'sequence')}{ramp} x {train.sequence_length}{rows}"
    console.print(f"[bold]Batch[/]: {batch_shape} = {_count(batch['tokens_an_update'])} tokens per update")
    if all(counts):
        console.print(
            f"  = {plural(counts[0], 'data-parallel rank')} x {plural(counts[1], 'micro-batch', 'micro-batches')} x "
            f"{plural(train.micro_batch_size, 'sequence')}"
            + (f", each sequence on {counts[2]} context-parallel ranks" if counts[2] > 1 else "")
            + (f", through {counts[3]} pipeline-parallel ranks" if counts[3] > 1 else "")
        )
    console.print(
        f"  {plural(train.steps, 'update')} read {_count(batch['tokens_in_all'])} tokens, "
        f"{batch['tokens_a_parameter']:.3g} per parameter"
    )
    for source in plan.coverage:
        available = "not prepared yet"
        if source.tokens is not None and source.epochs is not None:
            available = f"{_count(source.tokens)} available: {_epochs(source.epochs)} epochs"
        console.print(f"  {escape(source.path)}: {_count(source.tokens_wanted)} tokens needed, {available}")
    console.print()


def _show_memory(plan: Plan, config: RunConfig, console: Console) -> None:
    kinds = list(Memory.__dataclass_fields__)
    scale, unit = (1e9, "GB") if max(memory.peak for _, memory in plan.engines) >= 1e9 else (1e6, "MB")
    short = {"activations": "activ.", "gradients": "grads"}
    columns = [short.get(kind, kind) for kind in kinds]
    parallel = config.parallel
    axes = [("tensor", 2), ("context", parallel.context_parallel_size), ("pipeline", parallel.pipeline_parallel_size)]
    used = [axis for axis, size in axes if size > 1]
    shared = f"{'- and '.join(used)}-parallel size{'s' if len(used) > 1 else ''}"
    fullest = " (of the fullest rank)" if "pipeline" in used else ""
    table = _table(f"{unit} per rank{fullest}, at the configured {shared} and micro-batch", ["", *columns])
    for name, memory in plan.engines:
        sizes = [getattr(memory, kind) for kind in kinds]
        table.add_row(name, *(f"{size / scale:.2f}" if size else "-" for size in sizes))
    console.print(table, "")


def _show_step(candidate: Candidate, plan: Plan, config: RunConfig, console: Console) -> None:
    step = candidate.step
    table = _table(
        f"A step as configured ({candidate.layout.name}) on {plan.gpus} x {plan.gpu.name}",
        ["part", "seconds", "bytes per rank", "link"],
    )
    for name in ("matrices", "attention", "pointwise", "optimizer"):
        table.add_row(name, _seconds(getattr(step, name)), "", "")
        if name == "matrices" and step.experts:
            table.add_row("  of these routed experts", _seconds(step.experts), "", "")
    for part in step.traffic:
        overlap = ", overlapped" if part.hidden else ""
        table.add_row(part.what, _seconds(part.seconds), _bytes(part.bytes), part.link + overlap)
    table.add_row("exposed communication", _seconds(step.exposed), "", "")
    if step.bubble:
        table.add_row("bubble of the pipeline", _seconds(step.bubble), "", "")
    table.add_row("[bold]total[/]", f"[bold]{_seconds(step.seconds)}[/]", "", "")
    console.print(table)
    batch = plan.batch
    left = int(batch["updates"] - batch["updates_done"])
    remain = f" for the {plural(left, 'update')} that remain," if batch["updates_done"] else ""
    console.print(
        f"{step.tokens_per_second_per_gpu:,.0f} tokens/s per rank, MFU {candidate.mfu:.1%} causal, "
        f"[bold]{_days(candidate.days)}[/]{remain} to {_count(batch['tokens_in_all'])} tokens\n"
    )
    if plan.pipeline:
        _show_pipeline(plan.pipeline, candidate, console)
    if plan.experts:
        console.print(f"{_experts_line(plan.experts, candidate, config)}\n")
    if plan.exchanges:
        console.print(f"{_exchange_line(plan)}\n")
    if step.whole:
        console.print(f"{_whole_line(candidate)}\n")
    if plan.remark:
        console.print(f"[yellow]{escape(plan.remark)}[/]\n")


SHOWN_STAGES = 6
"""Of a rank, whose layers are shown one by one."""


def _show_pipeline(pipeline: Pipeline, candidate: Candidate, console: Console) -> None:
    """The cut into stages, and what each rank holds."""
    rounds = candidate.layout.rounds
    stages = f"{rounds.stages_per_rank} x " if rounds.stages_per_rank > 1 else ""
    title = (
        f"Pipeline, {pipeline.schedule}: idle {pipeline.idle_share:.1%} of forward and backward, "
        f"{rounds.ranks - 1} / ({stages}{rounds.micro_batches} + {rounds.ranks - 1})"
    )
    table = _table(title, ["rank", "layers", "of all FLOPs", "in flight", "memory"])
    for number, rank in enumerate(pipeline.ranks):
        table.add_row(
            str(number), _layers(rank.layers), f"{rank.flops_share:.2%}", str(rank.in_flight), _bytes(rank.memory.peak)
        )
    console.print(table, "")


def _layers(counts: Sequence[int]) -> str:
    """Layers of each of a rank's stages: "4 + 4 + 3", and of many stages "39 x 1 + 2"."""
    if len(counts) <= SHOWN_STAGES:
        return " + ".join(map(str, counts))
    runs = ((layers, len([*alike])) for layers, alike in groupby(counts))
    return " + ".join(f"{times} x {layers}" if times > 1 else str(layers) for layers, times in runs)


def _exchange_line(plan: Plan) -> str:
    """What each exchange of context-parallel ranks costs, the one of shorter steps first."""
    told = [
        f"{each.layout.context_exchange} {_seconds(each.step.seconds)} s a step ({_seconds(each.step.exchange)} s of it "
        f"exposed exchange), {_bytes(each.memory.peak)}"
        for each in sorted(plan.exchanges, key=lambda candidate: candidate.step.seconds)
    ]
    alone = "; these heads cannot be exchanged" if len(told) == 1 else ""
    return f"parallel.context_exchange: {'; '.join(told)}{alone}"


def _experts_line(experts: ExpertPlan, candidate: Candidate, config: RunConfig) -> str:
    """What routed experts cost, and what uneven loads would."""
    split = f" on each of {candidate.layout.expert_parallel_size} ranks" if experts.uneven else " on every rank"
    told = f"Experts: {experts.per_rank} of {config.model.n_routed_experts}{split}"
    if not experts.uneven:
        return told
    told += (
        f"; a rank sends {_bytes(experts.bytes)} of tokens per update in {_seconds(experts.seconds)} s, "
        f"{_seconds(experts.exposed)} s of it exposed. Where the busiest rank gets"
    )
    cases = [
        f" {each.layout.expert_load:g} x the mean: {_seconds(each.step.seconds)} s a step, {_bytes(each.memory.peak)}"
        + ("" if each.fits else ", which does not fit")
        for each in experts.uneven
    ]
    return told + ";".join(cases)


def _whole_line(candidate: Candidate) -> str:
    """What whole matrices cost of a step."""
    step, whole = candidate.step, candidate.step.whole
    assert whole is not None
    moved = f", {_bytes(whole.bytes)} sent by all ranks" if whole.bytes else ""
    return (
        f"Newton-Schulz: {whole.flops / 1e12:.4g} TFLOP per update, {_seconds(whole.seconds)} s "
        f"({_seconds(whole.exposed)} s of it exposed communication), {whole.seconds / step.seconds:.1%} of the step; most "
        f"loaded rank {whole.imbalance:.2f} x the mean{moved}"
    )


def _show_layouts(plan: Plan, console: Console) -> None:
    shared = any(candidate.layout.context_parallel_size > 1 for candidate in plan.ranked)
    ranks = "tensor x data or tensor x context x data ranks" if shared else "tensor x data ranks"
    if any(candidate.layout.pipeline_parallel_size > 1 for candidate in plan.ranked):
        ranks += ", of every stage of a pipeline"
    title = f"Layouts of {plan.gpus} x {plan.gpu.name} that fit, fastest first ({ranks}, micro-batch x count)"
    table = _table(title, ["", "micro", "recompute", "memory", "step s", "tok/s per rank", "MFU", "time"])
    for candidate in plan.ranked:
        layout, step = candidate.layout, candidate.step
        table.add_row(
            layout.name, f"{layout.micro_batch_size}x{layout.micro_batches}", layout.recompute,
            _bytes(candidate.memory.peak), _seconds(step.seconds), f"{step.tokens_per_second_per_gpu:,.0f}",
            f"{candidate.mfu:.1%}", _days(candidate.days),
        )  # fmt: skip
    console.print(table)
    for refusal in plan.refused:
        console.print(f"[yellow]not {escape(refusal.name)}[/]: {escape(refusal.reason)}")


def _count(number: float) -> str:
    """Four digits: 950, 12.34k, 8.03B."""
    for scale, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= 0.99995 * scale:  # above it the smaller unit would show 1000
            return f"{number / scale:.4g}{letter}"
    return f"{number:.4g}"


def _bytes(number: float) -> str:
    return format_bytes(number) if number else "-"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g}" if seconds < 999.5 else f"{seconds:,.0f}"


def _epochs(epochs: float) -> str:
    return f"{epochs:.2f}" if epochs >= 0.1 else f"{epochs:.2g}"


def _days(days: float) -> str:
    if days < 1 / 1440:
        return f"{_seconds(days * 86400)} s"
    if days >= 1:
        return f"{days:.1f} days"
    return f"{days * 24:.1f} hours" if days * 24 >= 1 else f"{days * 1440:.1f} minutes"
