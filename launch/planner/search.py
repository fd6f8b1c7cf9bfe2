"""The layouts that a number of ranks allows: which fit, the fastest of each kind, and why the others cannot run."""

from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from itertools import product
from math import gcd, inf
from typing import Literal, get_args

from launch.batches import batch_sizes
from launch.config import RunConfig
from launch.config_checks import optimized
from launch.planner.memory import Layout, Memory, can_split_experts, memory
from launch.planner.time import Accelerator, StepTime, predict
from model.flops import flops_per_token
from model.parallel.context import ContextExchange
from model.sizes import check_split, planned_network
from trainer.config import TrainConfig
from trainer.monitoring.progress import plural
from trainer.optimizers.check import check_optimizer

USABLE = 0.92
"""Share of the memory that tensors may fill; the rest is for the CUDA context, collectives and fragmentation."""
ENGINES: tuple[tuple[Literal["zero", "fold"], int], ...] = (("zero", 1), ("zero", 2), ("zero", 3), ("fold", 1))
RECOMPUTE = tuple(
    value
    for value in ("none", "experts", "selective", "full")
    if value in get_args(TrainConfig.model_fields["recompute"].annotation)
)
"""The least recomputation first."""


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


def make_candidate(config: RunConfig, layout: Layout, device: Accelerator, needed: Memory | None = None) -> Candidate:
    """Memory and time of one layout; the memory as handed in, if it is known."""
    needed, step = needed or memory(config, layout, device.kind), predict(config, layout, device)
    flops = flops_per_token(config.model, config.train.sequence_length, causal=True)
    mfu = step.tokens_per_second_per_gpu * flops / device.peak_flops(config.train.precision)
    largest_updates = batch_sizes(config.train).before(config.train.steps) / max(config.train.batch_sizes)
    days = step.seconds * largest_updates / 86400
    return Candidate(layout, needed, step, mfu, days, _fits(needed, device))


def _fits(needed: Memory, device: Accelerator) -> bool:
    return needed.peak <= USABLE * device.memory_bytes


def search(config: RunConfig, gpus: int, device: Accelerator) -> tuple[list[Candidate], list[Refusal]]:
    """The fastest layout of each (engine, stage, tensor-parallel size) that fits, fastest first; and the refused ones.

    That with whole sequences and with the configured context-parallel size, and without a pipeline and with the configured
    one. Sharing sequences costs what attention exchanges, a pipeline its bubble; they pay where a sequence or the network is
    too large for a rank, or fits with recomputation only. So larger sizes are tried as `_growing` says; in a pipeline the
    context-parallel sizes of the layouts listed so far.
    """
    problems = {engine: _cannot_run(config, engine) for engine, _ in ENGINES}
    refused = [Refusal("ZeRO" if engine == "zero" else engine, reason) for engine, reason in problems.items() if reason]
    engines = [each for each in ENGINES if not problems[each[0]]]
    known = {1, config.parallel.context_parallel_size}

    def pipelined(pipeline: int) -> _Found:
        contexts = {*_powers(gpus), *known} if pipeline == 1 else known

        def shared(context: int) -> _Found:
            shape = replace(_SHAPE, context_parallel_size=context, pipeline_parallel_size=pipeline)
            return _search_shape(config, gpus, shape, engines, device)

        found = _growing("context", contexts, {1, config.parallel.context_parallel_size}, shared, device)
        known.update(candidate.layout.context_parallel_size for candidate in found.ranked)
        return found

    configured = config.parallel.pipeline_parallel_size
    sizes = {*_powers(min(gpus, config.model.num_hidden_layers)), configured}
    found = _growing("pipeline", sizes, {1, configured}, pipelined, device)
    return sorted(found.ranked, key=_seconds), refused + found.refused


@dataclass(frozen=True)
class _Found:
    """Layouts that fit, the fastest of each kind; the refused ones; and the smallest of all."""

    ranked: list[Candidate]
    refused: list[Refusal]
    smallest: Candidate | None


def _growing(what: str, sizes: Set[int], listed: Set[int], look: Callable[[int], _Found], device: Accelerator) -> _Found:
    """What is found with these sizes of something. A size that is not to be listed is tried as long as nothing fits or the size
    before was faster; of each its fastest layout is listed if it is the fastest so far, and one refusal if nothing fits."""
    ranked, refused, smallest, pays = list[Candidate](), list[Refusal](), list[Candidate](), True
    for size in sorted({*sizes, *listed}):
        if size not in listed and not pays:
            continue
        found = look(size)
        best, before = min(found.ranked, key=_seconds, default=None), min(map(_seconds, ranked), default=inf)
        pays = (best is None and not ranked) or (best is not None and _seconds(best) < before)
        smallest += [found.smallest] if found.smallest else []
        if size in listed:
            ranked, refused = ranked + found.ranked, refused + found.refused
        elif best and pays:
            ranked.append(best)
        elif found.smallest and not ranked:
            reason = f"its smallest, {found.smallest.layout.name}, {too_large(found.smallest, device)}"
            refused.append(Refusal(f"{what} {size}", reason))
    return _Found(ranked, refused, min(smallest, key=_peak, default=None))


def _search_shape(
    config: RunConfig, gpus: int, shape: Layout, engines: Sequence[tuple[Literal["zero", "fold"], int]], device: Accelerator
) -> _Found:
    """Layouts with the context- and pipeline-parallel size of a shape."""
    ranked, refused, smallest = list[Candidate](), list[Refusal](), list[Candidate]()
    pipeline, context = shape.pipeline_parallel_size, shape.context_parallel_size
    for size in _tensor_parallel_sizes(gpus, context * pipeline, device):
        data = gpus // (size * context * pipeline)
        shape = replace(shape, data_parallel_size=data, tensor_parallel_size=size)
        reason = _cannot_split(config, size) or _cannot_share(config, shape)
        if reason:
            refused.append(Refusal(shape.ranks, reason))
            continue
        for engine, stage in engines:
            if pipeline > 1 and (engine, stage) == ("zero", 3):
                continue
            layout = replace(shape, engine=engine, zero_stage=stage)
            needed = [(each, memory(config, each, device.kind)) for each in _layouts(config, layout, device)]
            if not needed:
                refused.append(Refusal(layout.name, _no_batch(config, layout)))
                continue
            least = min(needed, key=lambda pair: pair[1].peak)
            smallest.append(make_candidate(config, least[0], device, least[1]))
            fitting = [make_candidate(config, each, device, held) for each, held in needed if _fits(held, device)]
            if fitting:
                ranked.append(min(fitting, key=_seconds))
            else:
                refused.append(Refusal(layout.name, too_large(smallest[-1], device)))
    return _Found(ranked, refused, min(smallest, key=_peak, default=None))


_SHAPE = Layout(1, 1, False, "zero", 1, "none", 1, 1, "none")
"""Completed by the search."""


def _peak(candidate: Candidate) -> int:
    return candidate.memory.peak


def _seconds(candidate: Candidate) -> float:
    return candidate.step.seconds


def exchange_candidates(config: RunConfig, configured: Candidate | None, device: Accelerator) -> list[Candidate]:
    """The configured layout with each exchange that its context-parallel ranks can make, as configured first."""
    if configured is None or (layout := configured.layout).context_parallel_size == 1:
        return []
    possible = _possible_exchanges(config, layout)
    others = [replace(layout, context_exchange=each) for each in possible if each != layout.context_exchange]
    return [configured, *(make_candidate(config, each, device) for each in others)]


def hpz_size(layout: Layout, per_node: int) -> int:
    """zero_hpz_partition_size: the ranks of a node with the same weights where ZeRO-3 spans several nodes, else 1."""
    in_node = per_node // layout.tensor_parallel_size
    spans = 1 < in_node < layout.replicas and layout.replicas % in_node == 0
    return in_node if layout.engine == "zero" and layout.zero_stage == 3 and spans else 1


def _powers(limit: int) -> Iterator[int]:
    size = 1
    while size <= limit:
        yield size
        size *= 2


def _tensor_parallel_sizes(gpus: int, others: int, device: Accelerator) -> Iterator[int]:
    """Those that divide the ranks, with groups of `others` ranks on other axes."""
    return (size for size in _powers(min(gpus, device.per_node)) if gpus % (size * others) == 0)


def _cannot_split(config: RunConfig, size: int) -> str:
    try:
        check_split(config.model, size)
    except ValueError as error:
        return str(error)
    return ""


def _cannot_share(config: RunConfig, shape: Layout) -> str:
    """Why ranks cannot share sequences as a layout says; "" if they can."""
    chunks, length = 2 * shape.context_parallel_size, config.train.sequence_length
    if shape.context_parallel_size == 1 or length % chunks == 0:
        return ""
    return f"train.sequence_length = {length} does not divide into {chunks} chunks of its context-parallel ranks"


def _possible_exchanges(config: RunConfig, layout: Layout) -> list[ContextExchange]:
    """How the context-parallel ranks of a layout can exchange what attention needs."""
    attention = planned_network(config.model, layout.tensor_parallel_size).blocks[0].self_attn  # all blocks have its heads
    if layout.context_parallel_size > 1 and attention.can_exchange_heads(layout.context_parallel_size):
        return ["gather", "heads"]
    return ["gather"]


def _cannot_run(config: RunConfig, engine: Literal["zero", "fold"]) -> str:
    try:
        check_optimizer(*optimized(config), engine)
    except ValueError as error:
        return str(error)
    return ""


def _no_batch(config: RunConfig, layout: Layout) -> str:
    """Why no micro-batch suits a layout."""
    data = layout.data_parallel_size
    uneven = [size for size in config.train.batch_sizes if size % data]
    size = uneven[0] if uneven else min(config.train.batch_sizes)
    key = "train.global_batch_size" if size == config.train.global_batch_size else "train.batch_ramp"
    if uneven:
        return f"{key} = {size} does not divide over {plural(data, 'data-parallel rank')}"
    return (
        f"{key} = {size} is {plural(size // data, 'sequence')} per data-parallel rank, too few for a pipeline of "
        f"{layout.pipeline_parallel_size} ranks"
    )


def _layouts(config: RunConfig, base: Layout, device: Accelerator) -> Iterator[Layout]:
    """Every micro-batch (powers of two and the configured one) with every recomputation, exchange, schedule and number of ranks
    that split the experts, ZeRO-3 with and without hpZ."""
    data, size, length = base.data_parallel_size, base.tensor_parallel_size, config.train.sequence_length
    shares = [size // data for size in config.train.batch_sizes if size % data == 0]
    if len(shares) < len(config.train.batch_sizes):
        return
    exchanges, splits, recomputations = _possible_exchanges(config, base), _expert_sizes(config, base), recompute_values(config)
    for micro in sorted({1, 2, 4, 8, 16, 32, 64, config.train.micro_batch_size}):
        if any(share % micro for share in shares):
            continue
        layout = replace(base, micro_batch_size=micro, micro_batches=max(shares) // micro)
        layout = replace(layout, sequence_parallel=size > 1 and layout.tokens(length) % size == 0)
        stages = _stages_per_rank(config, layout, [share // micro for share in shares])
        for recompute, exchange, hpz, each, split in product(
            recomputations, exchanges, sorted({1, hpz_size(layout, device.per_node)}), stages, splits
        ):
            found = replace(layout, recompute=recompute, context_exchange=exchange, zero_hpz_partition_size=hpz)
            yield replace(found, pipeline_stages_per_rank=each, expert_parallel_size=split)


def recompute_values(config: RunConfig) -> tuple[str, ...]:
    """Values of train.recompute that do something of their own for a network, the least recomputation first."""
    return tuple(value for value in RECOMPUTE if value != "experts" or config.model.layers_with_experts)


def _expert_sizes(config: RunConfig, base: Layout) -> list[int]:
    """Numbers of ranks that can split the experts: 1, 8, 64 and so on, fewer than 8 only where 8 cannot, and the configured
    one."""
    if not config.model.layers_with_experts:
        return [1]
    most = gcd(base.replicas, config.model.n_routed_experts)
    sizes = {*(8**power for power in range(8)), config.parallel.expert_parallel_size, most if most < 8 else 1}
    return [size for size in sorted(sizes) if can_split_experts(config, replace(base, expert_parallel_size=size))]


def _stages_per_rank(config: RunConfig, layout: Layout, counts: Sequence[int]) -> list[int]:
    """Stages of a pipeline's rank, 1, 2 or as configured, of which there are layers enough and with whose schedule these counts
    of micro-batches can run."""
    parallel, ranks, layers = config.parallel, layout.pipeline_parallel_size, config.model.num_hidden_layers
    if ranks == 1:
        return [1]
    configured = parallel.pipeline_stages // parallel.pipeline_parallel_size

    def possible(stages: int) -> bool:
        schedule = {"pipeline_parallel_size": ranks, "pipeline_schedule": "1f1b" if stages == 1 else "interleaved"}
        made = parallel.model_copy(update=schedule)
        return ranks * stages <= layers and all(made.can_schedule(count) for count in counts)

    return [stages for stages in sorted({1, 2, configured}) if possible(stages)]


def too_large(candidate: Candidate, device: Accelerator) -> str:
    """Why a layout does not fit."""
    needed, layout = candidate.memory, candidate.layout
    return (
        f"needs {needed.peak / 1e9:.1f} GB per rank, {needed.training_state / 1e9:.1f} GB of it training state, with "
        f"micro_batch_size = {layout.micro_batch_size} and recompute = {layout.recompute}; "
        f"{device.name} has {USABLE * device.memory_bytes / 1e9:.1f} GB to use"
    )
