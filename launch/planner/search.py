"""The layouts that a number of ranks allows: which fit, the fastest of each kind, and why the others cannot run."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import inf
from typing import Literal

from launch.batches import batch_sizes
from launch.config import RunConfig
from launch.config_checks import optimized
from launch.planner.memory import Layout, Memory, memory
from launch.planner.time import Accelerator, StepTime, predict
from model.flops import flops_per_token
from model.parallel.context import ContextExchange
from model.sizes import check_split, planned_network
from trainer.monitoring.progress import plural
from trainer.optimizers.check import check_optimizer

USABLE = 0.92
"""Share of the memory that tensors may fill; the rest is for the CUDA context, collectives and fragmentation."""
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


def make_candidate(config: RunConfig, layout: Layout, device: Accelerator) -> Candidate:
    """Memory and time of one layout."""
    needed, step = memory(config, layout, device.kind), predict(config, layout, device)
    flops = flops_per_token(config.model, config.train.sequence_length, causal=True)
    mfu = step.tokens_per_second_per_gpu * flops / device.peak_flops(config.train.precision)
    largest_updates = batch_sizes(config.train).before(config.train.steps) / max(config.train.batch_sizes)
    days = step.seconds * largest_updates / 86400
    return Candidate(layout, needed, step, mfu, days, needed.peak <= USABLE * device.memory_bytes)


def search(config: RunConfig, gpus: int, device: Accelerator) -> tuple[list[Candidate], list[Refusal]]:
    """The fastest layout of each (engine, stage, tensor-parallel size) that fits, fastest first; and the refused ones.

    That with whole sequences and with the configured context-parallel size. Sharing sequences costs what attention exchanges,
    and pays where a sequence is too long for a rank, or fits with recomputation only. So larger context-parallel sizes are
    tried as long as nothing fits or the size before was faster; of each its fastest layout is listed if it is the fastest so
    far, and one refusal if nothing fits.
    """
    problems = {engine: _cannot_run(config, engine) for engine, _ in ENGINES}
    refused = [Refusal("ZeRO" if engine == "zero" else engine, reason) for engine, reason in problems.items() if reason]
    engines = [each for each in ENGINES if not problems[each[0]]]
    ranked, listed, pays = list[Candidate](), {1, config.parallel.context_parallel_size}, True
    for context in sorted({*_powers(gpus), *listed}):
        if context not in listed and not pays:
            continue
        found, reasons, smallest = _search_context(config, gpus, context, engines, device)
        best, before = min(found, key=_seconds, default=None), min(map(_seconds, ranked), default=inf)
        pays = (best is None and not ranked) or (best is not None and _seconds(best) < before)
        if context in listed:
            ranked, refused = ranked + found, refused + reasons
        elif best and pays:
            ranked.append(best)
        elif smallest and not ranked:
            reason = f"its smallest, {smallest.layout.name}, {too_large(smallest, device)}"
            refused.append(Refusal(f"context {context}", reason))
    return sorted(ranked, key=_seconds), refused


def _search_context(
    config: RunConfig, gpus: int, context: int, engines: Sequence[tuple[Literal["zero", "fold"], int]], device: Accelerator
) -> tuple[list[Candidate], list[Refusal], Candidate | None]:
    """Layouts of one context-parallel size that fit, the fastest of each kind; the refused ones; and the smallest of all."""
    ranked, refused, smallest = list[Candidate](), list[Refusal](), list[Candidate]()
    for size in _tensor_parallel_sizes(gpus, context, device):
        data = gpus // (size * context)
        shape = replace(_SHAPE, data_parallel_size=data, tensor_parallel_size=size, context_parallel_size=context)
        reason = _cannot_split(config, size) or _cannot_share(config, shape)
        if reason:
            refused.append(Refusal(shape.ranks, reason))
            continue
        for engine, stage in engines:
            layout = replace(shape, engine=engine, zero_stage=stage)
            candidates = [make_candidate(config, each, device) for each in _layouts(config, layout, device)]
            if not candidates:
                refused.append(Refusal(layout.name, _no_batch(config, data)))
                continue
            smallest.append(min(candidates, key=_peak))
            fitting = [candidate for candidate in candidates if candidate.fits]
            if fitting:
                ranked.append(min(fitting, key=_seconds))
            else:
                refused.append(Refusal(layout.name, too_large(smallest[-1], device)))
    return ranked, refused, min(smallest, key=_peak, default=None)


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


def _tensor_parallel_sizes(gpus: int, context: int, device: Accelerator) -> Iterator[int]:
    return (size for size in _powers(min(gpus, device.per_node)) if gpus % (size * context) == 0)


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


def _no_batch(config: RunConfig, data: int) -> str:
    size = next(size for size in config.train.batch_sizes if size % data)
    key = "train.global_batch_size" if size == config.train.global_batch_size else "train.batch_ramp"
    return f"{key} = {size} does not divide over {plural(data, 'data-parallel rank')}"


def _layouts(config: RunConfig, base: Layout, device: Accelerator) -> Iterator[Layout]:
    """Every micro-batch (powers of two and the configured one) with every recomputation and exchange, ZeRO-3 with and without
    hpZ."""
    data, size, length = base.data_parallel_size, base.tensor_parallel_size, config.train.sequence_length
    shares = [size // data for size in config.train.batch_sizes if size % data == 0]
    if len(shares) < len(config.train.batch_sizes):
        return
    exchanges = _possible_exchanges(config, base)
    for micro in sorted({1, 2, 4, 8, 16, 32, 64, config.train.micro_batch_size}):
        if any(share % micro for share in shares):
            continue
        layout = replace(base, micro_batch_size=micro, micro_batches=max(shares) // micro)
        layout = replace(layout, sequence_parallel=size > 1 and layout.tokens(length) % size == 0)
        for recompute, exchange, hpz in product(RECOMPUTE, exchanges, sorted({1, hpz_size(layout, device.per_node)})):
            yield replace(layout, recompute=recompute, context_exchange=exchange, zero_hpz_partition_size=hpz)


def too_large(candidate: Candidate, device: Accelerator) -> str:
    """Why a layout does not fit."""
    needed, layout = candidate.memory, candidate.layout
    return (
        f"needs {needed.peak / 1e9:.1f} GB per rank, {needed.training_state / 1e9:.1f} GB of it training state, with "
        f"micro_batch_size = {layout.micro_batch_size} and recompute = {layout.recompute}; "
        f"{device.name} has {USABLE * device.memory_bytes / 1e9:.1f} GB to use"
    )
