"""What a run will need before anything is bought or queued: memory, operations, communication, days.

`plan` is arithmetic on the configuration and the accelerator's data sheet. It finds every layout of the given ranks,
says which fit and how fast each should be, and why the others cannot be.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from launch.config import RunConfig, may_select
from launch.memory import Layout, Memory, layout_of, memory
from launch.predict import Accelerator, Assumptions, Step, accelerator, predict
from model.flops import flops_per_token, parameters
from trainer.optimizer import check as check_optimizer

USABLE = 0.92
"""Share of the memory that tensors may fill; the rest goes to the context, the collectives and fragmentation."""
RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class Candidate:
    """One layout, its memory, its time."""

    layout: Layout
    memory: Memory
    step: Step
    mfu: float
    """Share of the peak in train.precision, attention counted causally."""
    days: float
    fits: bool


@dataclass(frozen=True)
class Refusal:
    """A layout that cannot be, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Coverage:
    """How often a source is read. Tokens are None where its shards are not there to be counted."""

    path: str
    tokens_wanted: float
    tokens: int | None
    epochs: float | None


@dataclass(frozen=True)
class Plan:
    """All that `tiglon plan` says."""

    gpus: int
    gpu: Accelerator
    parameters: dict[str, int]
    flops_per_token: dict[str, float]
    batch: dict[str, float]
    configured: Candidate | None
    problem: str
    """Why the configured layout cannot run on these ranks; empty if it can."""
    engines: list[tuple[str, Memory]]
    """Bytes per rank for every engine and stage, at the configured tensor-parallel size and micro-batch."""
    ranked: list[Candidate]
    refused: list[Refusal]
    coverage: list[Coverage]
    assumptions: Assumptions

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = asdict(self)
        values["engines"] = [{"engine": name, **held.as_dict()} for name, held in self.engines]
        values["configured"] = None if self.configured is None else _plain(self.configured)
        values["ranked"] = [_plain(candidate) for candidate in self.ranked]
        return values


def plan(config: RunConfig, gpus: int, gpu: str, corpus: Mapping[str, int] | None = None) -> Plan:
    """Plan a run.

    Args:
        gpus: ranks in all.
        gpu: name of the accelerator (launch/predict.py lists them).
        corpus: tokens of each prepared source by its path, where known.

    Raises:
        ValueError: an accelerator that is not known, or fewer than one rank.
    """
    device, train = accelerator(gpu), config.train
    if gpus < 1:
        raise ValueError(f"--gpus must be at least 1, got {gpus}")
    configured, problem = None, ""
    try:
        layout = choose_layout(config, gpus, device.per_node, device.memory_bytes, device.kind)
        configured = judge(config, layout, device)
    except ValueError as error:
        problem = str(error)
    if configured and not configured.fits:
        problem = _too_large(configured, device)
    ranked, refused = search(config, gpus, device)
    both = {
        name: flops_per_token(config.model, train.sequence_length, how) for name, how in (("causal", True), ("full", False))
    }
    return Plan(
        gpus, device, parameters(config.model), both, _batch(config, configured), configured, problem,
        _engines(config, gpus, device), ranked, refused, coverage(config, corpus or {}), Assumptions(),
    )  # fmt: skip


def judge(config: RunConfig, layout: Layout, device: Accelerator) -> Candidate:
    """Memory and time of one layout."""
    held, step = memory(config, layout, device.kind), predict(config, layout, device)
    operations = flops_per_token(config.model, config.train.sequence_length, causal=True)
    mfu = step.tokens_per_second_per_gpu * operations / device.peak_flops(config.train.precision)
    days = step.seconds * config.train.steps / 86400
    return Candidate(layout, held, step, mfu, days, held.peak <= USABLE * device.memory_bytes)


def search(config: RunConfig, gpus: int, device: Accelerator) -> tuple[list[Candidate], list[Refusal]]:
    """The fastest way to run each (engine, stage, tensor-parallel size) that fits, fastest first; and the rest."""
    ranked, refused = [], []
    for size in _sizes(gpus, device):
        reason = _cannot_split(config, size)
        if reason:
            refused.append(Refusal(f"{size}x{gpus // size}", reason))
            continue
        for engine, stage in (("zero", 1), ("zero", 2), ("zero", 3), ("fold", 1)):
            found = [judge(config, layout, device) for layout in _layouts(config, gpus, size, engine, stage, device)]
            name = f"{'fold' if engine == 'fold' else f'ZeRO-{stage}'} {size}x{gpus // size}"
            reason = _cannot_run(config, engine)
            if reason or not found:
                refused.append(Refusal(name, reason or _no_batch(config, gpus // size)))
                continue
            fitting = [candidate for candidate in found if candidate.fits]
            if fitting:
                ranked.append(min(fitting, key=lambda candidate: candidate.step.seconds))
            else:
                smallest = min(found, key=lambda candidate: candidate.memory.peak)
                refused.append(Refusal(name, _too_large(smallest, device)))
    return sorted(ranked, key=lambda candidate: candidate.step.seconds), refused


def choose_recompute(config: RunConfig, gpus: int, memory_bytes: float, device: str = "cuda") -> str:
    """`train.recompute`, with "auto" made the least recomputation that fits the memory of a rank; "full" if none does."""
    if config.train.recompute != "auto":
        return config.train.recompute
    layout = layout_of(config, gpus)
    for how in RECOMPUTE if may_select(config) else ("none", "full"):
        if memory(config, replace(layout, recompute=how), device).peak <= USABLE * memory_bytes:
            return how
    return "full"


def choose_layout(config: RunConfig, gpus: int, per_node: int, memory_bytes: float, device: str = "cuda") -> Layout:
    """The layout the configuration asks for on `gpus` ranks, `per_node` of them in a node, with its defaults filled in.

    Raises:
        ValueError: the ranks or the batch do not divide, or parallel.zero_hpz_partition_size does not.
    """
    layout = replace(layout_of(config, gpus), recompute=choose_recompute(config, gpus, memory_bytes, device))
    asked, data = config.parallel.zero_hpz_partition_size, layout.data_parallel_size
    if asked is not None:
        if data % asked:
            raise ValueError(
                f"parallel.zero_hpz_partition_size = {asked} does not divide {data} data-parallel ranks; "
                "use the data-parallel ranks of a node, or 1 for none"
            )
        return replace(layout, zero_hpz_partition_size=asked)
    copied = replace(layout, zero_hpz_partition_size=_hpz(layout, per_node))
    return copied if memory(config, copied, device).peak <= USABLE * memory_bytes else layout


def _hpz(layout: Layout, per_node: int) -> int:
    """The data-parallel ranks of a node where ZeRO 3 spans several, else 1."""
    inside = per_node // layout.tensor_parallel_size
    spans = 1 < inside < layout.data_parallel_size and layout.data_parallel_size % inside == 0
    return inside if layout.engine == "zero" and layout.zero_stage == 3 and spans else 1


def coverage(config: RunConfig, corpus: Mapping[str, int]) -> list[Coverage]:
    """Tokens each source gives over the whole run, phase by phase of the curriculum."""
    train, wanted = config.train, {}
    first = config.data.sources("train")
    starts = [(0, first)] if first else []
    starts += [(phase.from_step, phase.sources) for phase in config.data.curriculum]
    for index, (start, sources) in enumerate(starts):
        end = min(starts[index + 1][0] if index + 1 < len(starts) else train.steps, train.steps)
        total = sum(source.weight for source in sources)
        for source in sources:
            share = max(0, end - start) * train.batch_tokens * source.weight / total
            wanted[source.path] = wanted.get(source.path, 0.0) + share
    return [
        Coverage(path, tokens, corpus.get(path), tokens / corpus[path] if corpus.get(path) else None)
        for path, tokens in wanted.items()
    ]


def _sizes(gpus: int, device: Accelerator) -> Iterator[int]:
    size = 1
    while size <= min(gpus, device.per_node):
        if gpus % size == 0:
            yield size
        size *= 2


def _cannot_split(config: RunConfig, size: int) -> str:
    model = config.model
    names = ("num_attention_heads", "intermediate_size", "vocab_size")
    for name in names:
        if getattr(model, name) % size:
            return f"model.{name} = {getattr(model, name)} does not divide by {size}"
    if model.attention == "gqa" and model.kv_heads % size and size % model.kv_heads:
        return f"model.num_key_value_heads = {model.kv_heads} and {size} ranks do not divide each other"
    return ""


def _cannot_run(config: RunConfig, engine: str) -> str:
    parallel = config.parallel.model_copy(update={"engine": engine, "offload": "none"})
    try:
        check_optimizer(config.optimizer, config.model, parallel)
    except ValueError as error:
        return str(error)
    return ""


def _no_batch(config: RunConfig, data: int) -> str:
    return f"train.global_batch_size = {config.train.global_batch_size} sequences do not divide over {data} data-parallel ranks"


def _layouts(config: RunConfig, gpus: int, size: int, engine: Any, stage: int, device: Accelerator) -> Iterator[Layout]:
    """Every micro-batch (powers of two and the configured one) with every recomputation, and ZeRO-3 with hpZ and without."""
    data = gpus // size
    if config.train.global_batch_size % data:
        return
    share = config.train.global_batch_size // data
    for micro in sorted({1, 2, 4, 8, 16, 32, 64, config.train.micro_batch_size}):
        if share % micro == 0:
            for how in RECOMPUTE:
                split_tokens = size > 1 and micro * config.train.sequence_length % size == 0
                layout = Layout(data, size, split_tokens, engine, stage, "none", micro, share // micro, how)
                for hpz in sorted({1, _hpz(layout, device.per_node)}):
                    yield replace(layout, zero_hpz_partition_size=hpz)


def _engines(config: RunConfig, gpus: int, device: Accelerator) -> list[tuple[str, Memory]]:
    size, micro = config.parallel.tensor_parallel_size, config.train.micro_batch_size
    data = max(1, gpus // size)
    count = max(1, config.train.global_batch_size // (data * micro))
    base = Layout(data, size, config.parallel.sequence_parallel, "zero", 1, "none", micro, count, config.train.recompute)
    every = [(f"ZeRO-{stage}", replace(base, zero_stage=stage)) for stage in (1, 2, 3)]
    if (hpz := _hpz(replace(base, zero_stage=3), device.per_node)) > 1:
        every.append(("ZeRO-3+hpZ", replace(base, zero_stage=3, zero_hpz_partition_size=hpz)))
    every.append(("ZeRO-1+cpu", replace(base, offload="cpu")))
    every.append(("fold", replace(base, engine="fold")))
    return [(name, memory(config, layout, device.kind)) for name, layout in every]


def _batch(config: RunConfig, configured: Candidate | None) -> dict[str, float]:
    train = config.train
    numbers: dict[str, float] = {
        "tokens_an_update": train.batch_tokens,
        "updates": train.steps,
        "tokens_in_all": train.batch_tokens * train.steps,
        "tokens_a_parameter": train.batch_tokens * train.steps / parameters(config.model)["total"],
    }
    if configured:
        numbers["data_parallel_ranks"] = configured.layout.data_parallel_size
        numbers["micro_batches_a_rank"] = configured.layout.micro_batches
        numbers["tokens_a_micro_batch"] = train.micro_batch_size * train.sequence_length
    return numbers


def _too_large(candidate: Candidate, device: Accelerator) -> str:
    held, layout = candidate.memory, candidate.layout
    return (
        f"needs {held.peak / 1e9:.1f} GB per rank, {held.training_state / 1e9:.1f} GB of it training state, with "
        f"micro_batch_size = {layout.micro_batch_size} and recompute = {layout.recompute}; "
        f"{device.name} has {USABLE * device.memory_bytes / 1e9:.1f} GB to use"
    )


def _plain(candidate: Candidate) -> dict[str, Any]:
    values = asdict(candidate) | {"name": candidate.layout.name, "memory": candidate.memory.as_dict()}
    values["step"]["seconds"] = candidate.step.seconds
    values["step"]["tokens_per_second_per_gpu"] = candidate.step.tokens_per_second_per_gpu
    return values
