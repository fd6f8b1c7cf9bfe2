"""Plan a run before it is queued: memory, FLOPs, communication and days of every layout on the given ranks.

All is arithmetic on the configuration and the accelerator's data sheet: which layouts fit, how fast each should be, and why
the others cannot run.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from launch.config import BEGINNING, RunConfig, ahead, batch_sizes, may_select, optimized, total_batches, total_tokens
from launch.planner.memory import Layout, Memory, layout_of, memory
from launch.planner.time import Accelerator, Assumptions, StepTime, accelerator, predict
from model.flops import flops_per_token
from model.sizes import check_split, parameter_counts
from trainer.monitoring.progress import format_count, plural
from trainer.optimizers.check import check_optimizer
from trainer.state import State

USABLE = 0.92
"""Share of the memory that tensors may fill; the rest is for the CUDA context, collectives and fragmentation."""
LARGE_SHARE = 0.1
"""Of a step, above which whole matrices are worth a remark."""
ENGINES: tuple[tuple[Literal["zero", "fold"], int], ...] = (("zero", 1), ("zero", 2), ("zero", 3), ("fold", 1))
RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class Candidate:
    """One layout with its memory and time."""

    layout: Layout
    memory: Memory
    step: StepTime
    mfu: float
    """Model FLOPs utilization: share of the peak in train.precision, attention counted causally."""
    days: float
    """Of the updates that remain."""
    fits: bool


@dataclass(frozen=True)
class Refusal:
    """A layout that cannot run, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class TokenCoverage:
    """How often a source is read. `tokens` and `epochs` are None where its shards are not prepared yet."""

    path: str
    tokens_wanted: float
    tokens: int | None
    epochs: float | None


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

    def as_dict(self) -> dict[str, Any]:
        """Values for JSON."""
        values = asdict(self)
        values["engines"] = [{"engine": name, **needed.as_dict()} for name, needed in self.engines]
        values["configured"] = None if self.configured is None else _plain(self.configured)
        values["ranked"] = [_plain(candidate) for candidate in self.ranked]
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
        ValueError: an unknown accelerator, or fewer than one rank.
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
        problem = _too_large(configured, device)
    ranked, refused = search(left, gpus, device)
    flops = {how: flops_per_token(config.model, config.train.sequence_length, how == "causal") for how in ("causal", "full")}
    return Plan(
        gpus, device, parameter_counts(config.model), flops, _batch(config, configured, begun), configured, problem,
        _engines(left, gpus, device), ranked, refused, coverage(config, corpus or {}, begun),
        whole_remark(configured, config) if configured else "", Assumptions(),
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


def make_candidate(config: RunConfig, layout: Layout, device: Accelerator) -> Candidate:
    """Memory and time of one layout."""
    needed, step = memory(config, layout, device.kind), predict(config, layout, device)
    flops = flops_per_token(config.model, config.train.sequence_length, causal=True)
    mfu = step.tokens_per_second_per_gpu * flops / device.peak_flops(config.train.precision)
    largest_updates = batch_sizes(config.train).before(config.train.steps) / max(config.train.batch_sizes)
    days = step.seconds * largest_updates / 86400
    return Candidate(layout, needed, step, mfu, days, needed.peak <= USABLE * device.memory_bytes)


def search(config: RunConfig, gpus: int, device: Accelerator) -> tuple[list[Candidate], list[Refusal]]:
    """The fastest layout of each (engine, stage, tensor-parallel size) that fits, fastest first; and the refused ones."""
    problems = {engine: _cannot_run(config, engine) for engine, _ in ENGINES}
    refused = [Refusal("ZeRO" if engine == "zero" else engine, reason) for engine, reason in problems.items() if reason]
    ranked = []
    for size in _tensor_parallel_sizes(gpus, device):
        reason = _cannot_split(config, size)
        if reason:
            refused.append(Refusal(f"{size}x{gpus // size}", reason))
            continue
        for engine, stage in ENGINES:
            if problems[engine]:
                continue
            layouts = _layouts(config, gpus, size, engine, stage, device)
            candidates = [make_candidate(config, layout, device) for layout in layouts]
            name = f"{'fold' if engine == 'fold' else f'ZeRO-{stage}'} {size}x{gpus // size}"
            if not candidates:
                refused.append(Refusal(name, _no_batch(config, gpus // size)))
                continue
            fitting = [candidate for candidate in candidates if candidate.fits]
            if fitting:
                ranked.append(min(fitting, key=lambda candidate: candidate.step.seconds))
            else:
                smallest = min(candidates, key=lambda candidate: candidate.memory.peak)
                refused.append(Refusal(name, _too_large(smallest, device)))
    return sorted(ranked, key=lambda candidate: candidate.step.seconds), refused


def choose_recompute(config: RunConfig, gpus: int, memory_bytes: float, device: str = "cuda") -> str:
    """`train.recompute`, with "auto" resolved to the least recomputation that fits a rank's memory; "full" if none does."""
    if config.train.recompute != "auto":
        return config.train.recompute
    layout = layout_of(config, gpus)
    for recompute in RECOMPUTE if may_select(config) else ("none", "full"):
        if memory(config, replace(layout, recompute=recompute), device).peak <= USABLE * memory_bytes:
            return recompute
    return "full"


def choose_layout(config: RunConfig, gpus: int, per_node: int, memory_bytes: float, device: str = "cuda") -> Layout:
    """The layout that the configuration asks for on `gpus` ranks, `per_node` per node, with defaults filled in.

    Raises:
        ValueError: the ranks or the batch do not divide, or parallel.zero_hpz_partition_size does not.
    """
    layout = replace(layout_of(config, gpus), recompute=choose_recompute(config, gpus, memory_bytes, device))
    requested, data = config.parallel.zero_hpz_partition_size, layout.data_parallel_size
    if requested is not None:
        if data % requested:
            raise ValueError(
                f"parallel.zero_hpz_partition_size = {requested} does not divide {plural(data, 'data-parallel rank')}; "
                "use the data-parallel ranks of a node, or 1 for none"
            )
        return replace(layout, zero_hpz_partition_size=requested)
    with_copy = replace(layout, zero_hpz_partition_size=_hpz(layout, per_node))
    return with_copy if memory(config, with_copy, device).peak <= USABLE * memory_bytes else layout


def _hpz(layout: Layout, per_node: int) -> int:
    """zero_hpz_partition_size: the data-parallel ranks per node where ZeRO-3 spans several nodes, else 1."""
    in_node = per_node // layout.tensor_parallel_size
    spans = 1 < in_node < layout.data_parallel_size and layout.data_parallel_size % in_node == 0
    return in_node if layout.engine == "zero" and layout.zero_stage == 3 and spans else 1


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


def _tensor_parallel_sizes(gpus: int, device: Accelerator) -> Iterator[int]:
    size = 1
    while size <= min(gpus, device.per_node):
        if gpus % size == 0:
            yield size
        size *= 2


def _cannot_split(config: RunConfig, size: int) -> str:
    try:
        check_split(config.model, size)
    except ValueError as error:
        return str(error)
    return ""


def _cannot_run(config: RunConfig, engine: Literal["zero", "fold"]) -> str:
    try:
        check_optimizer(*optimized(config), engine)
    except ValueError as error:
        return str(error)
    return ""


def _no_batch(config: RunConfig, data: int) -> str:
    size = next(size for size in config.train.batch_sizes if size % data)
    key = "train.global_batch_size" if size == config.train.global_batch_size else "train.batch_ramp"
    return f"{key} = {size} does not divide over {plural(data, 'data-parallel rank')}"


def _layouts(config: RunConfig, gpus: int, size: int, engine: Any, stage: int, device: Accelerator) -> Iterator[Layout]:
    """Every micro-batch (powers of two and the configured one) with every recomputation, ZeRO-3 with and without hpZ."""
    data = gpus // size
    shares = [size // data for size in config.train.batch_sizes if size % data == 0]
    if len(shares) < len(config.train.batch_sizes):
        return
    for micro in sorted({1, 2, 4, 8, 16, 32, 64, config.train.micro_batch_size}):
        if all(share % micro == 0 for share in shares):
            for recompute in RECOMPUTE:
                sequence_parallel = size > 1 and micro * config.train.sequence_length % size == 0
                layout = Layout(data, size, sequence_parallel, engine, stage, "none", micro, max(shares) // micro, recompute)
                for hpz in sorted({1, _hpz(layout, device.per_node)}):
                    yield replace(layout, zero_hpz_partition_size=hpz)


def _engines(config: RunConfig, gpus: int, device: Accelerator) -> list[tuple[str, Memory]]:
    size, micro = config.parallel.tensor_parallel_size, config.train.micro_batch_size
    data = max(1, gpus // size)
    count = max(1, max(config.train.batch_sizes) // (data * micro))
    base = Layout(data, size, config.parallel.sequence_parallel, "zero", 1, "none", micro, count, config.train.recompute)
    layouts = [(f"ZeRO-{stage}", replace(base, zero_stage=stage)) for stage in (1, 2, 3)]
    if (hpz := _hpz(replace(base, zero_stage=3), device.per_node)) > 1:
        layouts.append(("ZeRO-3+hpZ", replace(base, zero_stage=3, zero_hpz_partition_size=hpz)))
    layouts.append(("ZeRO-1+cpu", replace(base, offload="cpu")))
    layouts.append(("fold", replace(base, engine="fold")))
    return [(name, memory(config, layout, device.kind)) for name, layout in layouts]


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
        batch["micro_batches_a_rank"] = configured.layout.micro_batches
        batch["tokens_a_micro_batch"] = train.micro_batch_size * train.sequence_length
    return batch


def _too_large(candidate: Candidate, device: Accelerator) -> str:
    needed, layout = candidate.memory, candidate.layout
    return (
        f"needs {needed.peak / 1e9:.1f} GB per rank, {needed.training_state / 1e9:.1f} GB of it training state, with "
        f"micro_batch_size = {layout.micro_batch_size} and recompute = {layout.recompute}; "
        f"{device.name} has {USABLE * device.memory_bytes / 1e9:.1f} GB to use"
    )


def _plain(candidate: Candidate) -> dict[str, Any]:
    values = asdict(candidate) | {"name": candidate.layout.name, "memory": candidate.memory.as_dict()}
    values["step"]["seconds"] = candidate.step.seconds
    values["step"]["tokens_per_second_per_gpu"] = candidate.step.tokens_per_second_per_gpu
    return values
