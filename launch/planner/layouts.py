"""Plan a run before it is queued: memory, FLOPs, communication and days of every layout on the given ranks.

All is arithmetic on the configuration and the accelerator's data sheet: which layouts fit, how fast each should be, and why
the others cannot run.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from launch.batches import BEGINNING, ahead, batch_sizes, total_batches, total_tokens
from launch.config import RunConfig
from launch.config_checks import may_select
from launch.planner.communication import EXPERT_EXCHANGES
from launch.planner.memory import Layout, Memory, can_split_experts, layout_of, memory, memory_of_rank, portions_of
from launch.planner.search import (
    USABLE,
    Candidate,
    Refusal,
    exchange_candidates,
    hpz_size,
    make_candidate,
    recompute_values,
    search,
    too_large,
)
from launch.planner.time import Accelerator, Assumptions, accelerator
from model.flops import flops_per_token
from model.sizes import parameter_counts
from trainer.monitoring.progress import format_count, plural
from trainer.state import State

LARGE_SHARE = 0.1
"""Of a step, above which whole matrices are worth a remark."""


@dataclass(frozen=True)
class TokenCoverage:
    """How often a source is read. `tokens` and `epochs` are None where its shards are not prepared yet."""

    path: str
    tokens_wanted: float
    tokens: int | None
    epochs: float | None


@dataclass(frozen=True)
class PipelineRank:
    """One rank of a pipeline."""

    layers: list[int]
    """Of each of its stages."""
    flops_share: float
    """Of the network's FLOPs per token, with attention counted causally."""
    in_flight: int
    """Most forwards of its stages whose backward is still to come."""
    memory: Memory


@dataclass(frozen=True)
class Pipeline:
    """How the configured layout cuts the network into stages."""

    schedule: str
    idle_share: float
    """Of forward and backward, in which a rank waits for others: the bubble."""
    ranks: list[PipelineRank]


@dataclass(frozen=True)
class ExpertPlan:
    """What the routed experts of the configured layout cost."""

    per_rank: int
    """Of every layer with experts."""
    bytes: float
    """That a rank sends other ranks of the copies of tokens in an update, if loads are even; 0 where it has all experts."""
    seconds: float
    """Of these."""
    exposed: float
    """Of these, seconds that do not overlap computation."""
    uneven: list[Candidate]
    """The layout with busiest ranks that get `expert_load` times the mean; none where every rank has all experts."""


UNEVEN_LOADS = (1.5, 2.0)


@dataclass(frozen=True)
class Plan:
    """What `tiglon plan` shows."""

    gpus: int
    gpu: Accelerator
    parameters: dict[str, int]
    flops_per_token: dict[str, float]
    batch: dict[str, float]
    configured: Candidate | None
    problem: str
    """Why the configured layout cannot run on these ranks; "" if it can."""
    engines: list[tuple[str, Memory]]
    """Bytes per rank for every engine and stage, at the configured tensor-parallel size and micro-batch."""
    ranked: list[Candidate]
    refused: list[Refusal]
    coverage: list[TokenCoverage]
    remark: str
    """A setting that works and is slow as configured, and what to do; "" if there is none."""
    assumptions: Assumptions
    exchanges: list[Candidate]
    """The configured layout with each exchange that its context-parallel ranks can make; none without such ranks."""
    pipeline: Pipeline | None
    """None without pipeline-parallel ranks."""
    experts: ExpertPlan | None
    """None without any."""

    def as_dict(self) -> dict[str, Any]:
        """Values for JSON."""
        values = asdict(self)
        values["engines"] = [{"engine": name, **needed.as_dict()} for name, needed in self.engines]
        values["configured"] = None if self.configured is None else _plain(self.configured)
        for key in ("ranked", "exchanges"):
            values[key] = [_plain(candidate) for candidate in getattr(self, key)]
        if self.experts:
            values["experts"]["uneven"] = [_plain(candidate) for candidate in self.experts.uneven]
        if self.pipeline:
            for rank, made in zip(values["pipeline"]["ranks"], self.pipeline.ranks, strict=True):
                rank["memory"] = made.memory.as_dict()
        return values


def make_plan(
    config: RunConfig, gpus: int, gpu: str, corpus: Mapping[str, int] | None = None, begun: State = BEGINNING
) -> Plan:  # fmt: skip
    """Plan a run: layouts and times of what remains of it, tokens and epochs of the whole.

    Args:
        gpus: ranks in all.
        gpu: name of the accelerator (launch/planner/time.py lists them).
        corpus: path of a prepared source -> its tokens, where known.
        begun: what the run has reached.

    Raises:
        ValueError: an unknown accelerator, fewer than one rank, or more pipeline stages than layers.
    """
    device, left = accelerator(gpu), ahead(config, begun)
    if gpus < 1:
        raise ValueError(f"--gpus must be at least 1, got {gpus}")
    configured, problem = None, ""
    try:
        layout = choose_layout(left, gpus, device.per_node, device.memory_bytes, device.kind)
        configured = make_candidate(left, layout, device)
    except ValueError as error:
        problem = str(error)
    if configured and not configured.fits:
        problem = too_large(configured, device)
    ranked, refused = search(left, gpus, device)
    flops = {how: flops_per_token(config.model, config.train.sequence_length, how == "causal") for how in ("causal", "full")}
    return Plan(
        gpus, device, parameter_counts(config.model), flops,
        _batch(config, configured, begun), configured, problem,
        _engines(left, gpus, device), ranked, refused, coverage(config, corpus or {}, begun),
        whole_remark(configured, config) if configured else "", Assumptions(), exchange_candidates(left, configured, device),
        pipeline_of(left, configured.layout, device.kind) if configured else None,
        experts_of(left, configured, device) if configured else None,
    )  # fmt: skip


def pipeline_of(config: RunConfig, layout: Layout, device: str) -> Pipeline | None:
    """How a layout cuts the network, on a "cuda" or "cpu" device; None without pipeline-parallel ranks."""
    if layout.pipeline_parallel_size == 1:
        return None
    length, rounds = config.train.sequence_length, layout.rounds
    whole = flops_per_token(config.model, length, causal=True)
    ranks = [
        PipelineRank(
            [len(layers) for layers in portion.stages],
            flops_per_token(config.model, length, True, portion.layers) / whole,
            rounds.in_flight(rank),
            memory_of_rank(config, layout, rank, device),
        )
        for rank, portion in enumerate(portions_of(config, layout))
    ]
    return Pipeline(layout.pipeline_schedule, rounds.idle_share, ranks)


def experts_of(config: RunConfig, candidate: Candidate, device: Accelerator) -> ExpertPlan | None:
    """What the experts of a layout cost; None without any."""
    layout, step = candidate.layout, candidate.step
    if not config.model.layers_with_experts:
        return None
    sent = [part for part in step.traffic if part.what in EXPERT_EXCHANGES]
    loads = UNEVEN_LOADS if layout.expert_parallel_size > 1 else ()
    return ExpertPlan(
        config.model.n_routed_experts // layout.expert_parallel_size, sum(part.bytes for part in sent),
        sum(part.seconds for part in sent), step.dispatch,
        [make_candidate(config, replace(layout, expert_load=load), device) for load in loads],
    )  # fmt: skip


def whole_remark(candidate: Candidate, config: RunConfig) -> str:
    """One sentence where whole matrices are a large part of a step; else ""."""
    step = candidate.step
    if step.whole is None or (share := step.whole.seconds / step.seconds) <= LARGE_SHARE:
        return ""
    whole, tokens = step.whole, f"{format_count(config.train.batch_tokens)} tokens"
    idle = f", and its most loaded rank has {whole.imbalance:.1f} x the mean" if whole.imbalance > 1.5 else ""
    advice = "raise train.global_batch_size"
    if whole.exposed > whole.compute:
        return f"sending Newton-Schulz's matrices makes it {share:.0%} of a step of {tokens}: {advice}"
    if whole.float32:
        advice += ", use optimizer.muon.precision=bf16"
    return f"Newton-Schulz is {share:.0%} of a step of {tokens}{idle}: {advice}, or lower optimizer.muon.newton_schulz_steps"


def choose_recompute(config: RunConfig, gpus: int, memory_bytes: float, device: str = "cuda") -> str:
    """`train.recompute`, with "auto" resolved to the least recomputation that fits a rank's memory; "full" if none does."""
    if config.train.recompute != "auto":
        return config.train.recompute
    layout = layout_of(config, gpus)
    for recompute in recompute_values(config) if may_select(config) else ("none", "full"):
        if memory(config, replace(layout, recompute=recompute), device).peak <= USABLE * memory_bytes:
            return recompute
    return "full"


def choose_layout(config: RunConfig, gpus: int, per_node: int, memory_bytes: float, device: str = "cuda") -> Layout:
    """The layout that the configuration asks for on `gpus` ranks, `per_node` per node, with defaults filled in.

    Raises:
        ValueError: the ranks or the batch do not divide, or parallel.zero_hpz_partition_size does not.
    """
    layout = replace(layout_of(config, gpus), recompute=choose_recompute(config, gpus, memory_bytes, device))
    requested = config.parallel.zero_hpz_partition_size
    if requested is not None:
        if layout.replicas % requested:
            context = layout.context_parallel_size
            shared = f" x {plural(context, 'context-parallel rank')}" if context > 1 else ""
            raise ValueError(
                f"parallel.zero_hpz_partition_size = {requested} does not divide "
                f"{plural(layout.data_parallel_size, 'data-parallel rank')}{shared}; "
                f"use the {'ranks with the same weights' if context > 1 else 'data-parallel ranks'} of a node, or 1 for none"
            )
        return replace(layout, zero_hpz_partition_size=requested)
    with_copy = replace(layout, zero_hpz_partition_size=hpz_size(layout, per_node))
    return with_copy if memory(config, with_copy, device).peak <= USABLE * memory_bytes else layout


def coverage(config: RunConfig, corpus: Mapping[str, int], begun: State = BEGINNING) -> list[TokenCoverage]:
    """Tokens that the run reads from each source, over all phases of the curriculum."""
    train, sizes, wanted = config.train, batch_sizes(config.train), {}
    batches = total_batches(train, begun)
    first = config.data.sources("train")
    starts = [(0, first)] if first else []
    starts += [(phase.from_step, phase.sources) for phase in config.data.curriculum]
    for index, (start, sources) in enumerate(starts):
        end = min(starts[index + 1][0] if index + 1 < len(starts) else batches, batches)
        total = sum(source.weight for source in sources)
        for source in sources:
            share = max(0, sizes.before(end) - sizes.before(start)) * train.sequence_length * source.weight / total
            wanted[source.path] = wanted.get(source.path, 0.0) + share
    return [
        TokenCoverage(path, tokens, corpus.get(path), tokens / corpus[path] if corpus.get(path) else None)
        for path, tokens in wanted.items()
    ]


def _engines(config: RunConfig, gpus: int, device: Accelerator) -> list[tuple[str, Memory]]:
    parallel, micro = config.parallel, config.train.micro_batch_size
    size, context, pipeline = parallel.tensor_parallel_size, parallel.context_parallel_size, parallel.pipeline_parallel_size
    data = max(1, gpus // (size * context * pipeline))
    count = max(1, max(config.train.batch_sizes) // (data * micro))
    base = Layout(
        data, size, parallel.sequence_parallel, "zero", 1, "none", micro, count, config.train.recompute, 1, context,
        parallel.context_exchange, pipeline, parallel.pipeline_stages // pipeline, parallel.expert_parallel_size,
    )  # fmt: skip
    layouts = [(f"ZeRO-{stage}", replace(base, zero_stage=stage)) for stage in ((1, 2, 3) if pipeline == 1 else (1, 2))]
    if pipeline == 1:
        if (hpz := hpz_size(replace(base, zero_stage=3), device.per_node)) > 1:
            layouts.append(("ZeRO-3+hpZ", replace(base, zero_stage=3, zero_hpz_partition_size=hpz)))
        layouts.append(("ZeRO-1+cpu", replace(base, offload="cpu")))
    layouts.append(("fold", replace(base, engine="fold")))
    possible = [(name, layout) for name, layout in layouts if can_split_experts(config, layout)]
    return [(name, memory(config, layout, device.kind)) for name, layout in possible]


def _batch(config: RunConfig, configured: Candidate | None, begun: State) -> dict[str, float]:
    train, tokens = config.train, total_tokens(config.train, begun)
    batch: dict[str, float] = {
        "tokens_an_update": train.batch_tokens,
        "updates": train.steps,
        "updates_done": begun.step,
        "tokens_in_all": tokens,
        "tokens_a_parameter": tokens / parameter_counts(config.model)["total"],
    }
    if configured:
        batch["data_parallel_ranks"] = configured.layout.data_parallel_size
        batch["context_parallel_ranks"] = configured.layout.context_parallel_size
        batch["pipeline_parallel_ranks"] = configured.layout.pipeline_parallel_size
        batch["micro_batches_a_rank"] = configured.layout.micro_batches
        batch["tokens_a_micro_batch"] = configured.layout.tokens(train.sequence_length)
    return batch


def _plain(candidate: Candidate) -> dict[str, Any]:
    values = asdict(candidate) | {"name": candidate.layout.name, "memory": candidate.memory.as_dict()}
    values["step"]["seconds"] = candidate.step.seconds
    values["step"]["tokens_per_second_per_gpu"] = candidate.step.tokens_per_second_per_gpu
    values["layout"]["pipeline_schedule"] = candidate.layout.pipeline_schedule
    return values
