"""Memory of one rank, by kind, for any layout: arithmetic on the configuration, no hardware.

`benchmarks/plan_check.py` compares it with the live engines.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Literal

from launch.batches import micro_batches
from launch.config import RunConfig
from launch.planner.exchange import WholeUpdate, plan_whole
from launch.planner.pipeline import (
    Portion,
    Rounds,
    copied_elements,
    elements_by_layer,
    owned_elements,
    portions,
    stage_elements,
    stored_elements,
)
from launch.planner.rules import settings_of, states_per_element, states_under
from model.activations import Activations, activations
from model.config import ModelConfig
from model.parallel.context import ContextExchange
from model.sizes import parameter_specs, planned_blocks
from model.sublayer import Execution
from trainer.config import STAGE_3
from trainer.engines.buckets import IN_FLIGHT, bucket_indexes


@dataclass(frozen=True)
class Layout:
    """How ranks share the work. Sizes in ranks and sequences."""

    data_parallel_size: int
    tensor_parallel_size: int
    sequence_parallel: bool
    engine: Literal["zero", "fold"]
    zero_stage: int
    offload: Literal["none", "cpu"]
    micro_batch_size: int
    micro_batches: int
    """Micro-batches per update and rank."""
    recompute: str
    zero_hpz_partition_size: int = 1
    """ZeRO-3: ranks with the same weights that share one more copy of them; 1 = none."""
    context_parallel_size: int = 1
    """Ranks that share the tokens of a sequence."""
    context_exchange: ContextExchange = "gather"
    pipeline_parallel_size: int = 1
    """Ranks that have the layers one after the other."""
    pipeline_stages_per_rank: int = 1
    """Runs of layers that each of them has; above 1 the schedule is interleaved."""
    expert_parallel_size: int = 1
    """Ranks, of those with the same weights otherwise, that split the experts."""
    expert_load: float = 1.0
    """Where they do: copies of tokens that the busiest of them gets, over the mean."""

    @property
    def gpus(self) -> int:
        """Ranks in all."""
        return self.stage_ranks * self.pipeline_parallel_size

    @property
    def stage_ranks(self) -> int:
        """Ranks with the same layers."""
        return self.replicas * self.tensor_parallel_size

    @property
    def pipeline_schedule(self) -> Literal["1f1b", "interleaved"]:
        """As parallel.pipeline_schedule."""
        return "interleaved" if self.pipeline_stages_per_rank > 1 else "1f1b"

    @property
    def pipeline_stages(self) -> int:
        """Runs of layers that the network is cut into."""
        return self.pipeline_parallel_size * self.pipeline_stages_per_rank

    @property
    def rounds(self) -> Rounds:
        """How micro-batches pass the pipeline."""
        return Rounds(self.pipeline_parallel_size, self.pipeline_stages_per_rank, self.micro_batches)

    @property
    def replicas(self) -> int:
        """Ranks with the same weights, which see different tokens: ZeRO cuts for them, gradients are summed over them."""
        return self.data_parallel_size * self.context_parallel_size

    @property
    def expert_replicas(self) -> int:
        """Ranks with the same experts."""
        return self.replicas // self.expert_parallel_size

    @property
    def replica_group(self) -> str:
        """The name of their group: that of the axis, where they lie on one alone."""
        if self.context_parallel_size == 1:
            return "data"
        return "context" if self.data_parallel_size == 1 else "replicas"

    @property
    def ranks(self) -> str:
        """Tensor-parallel x data-parallel size: "2x4"; where sequences are shared, tensor x context x data: "2x2x4"; behind it
        the ranks of a pipeline and the stages of each: "2x4 pipeline 4", "2x4 pipeline 4 interleaved 2"; and before these those
        that split experts: "1x8 experts 4"."""
        context = f"{self.context_parallel_size}x" if self.context_parallel_size > 1 else ""
        pipeline = f" pipeline {self.pipeline_parallel_size}" if self.pipeline_parallel_size > 1 else ""
        if self.pipeline_stages_per_rank > 1:
            pipeline += f" interleaved {self.pipeline_stages_per_rank}"
        experts = f" experts {self.expert_parallel_size}" if self.expert_parallel_size > 1 else ""
        return f"{self.tensor_parallel_size}x{context}{self.data_parallel_size}{experts}{pipeline}"

    @property
    def name(self) -> str:
        """Engine, then `ranks`, then the exchange of context-parallel ranks if it is not the default: "ZeRO-1 2x4"."""
        engine = "fold" if self.engine == "fold" else f"ZeRO-{self.zero_stage}"
        more = ("+hpZ" if self.zero_hpz_partition_size > 1 else "") + ("+offload" if self.offload == "cpu" else "")
        exchange = " heads" if self.context_parallel_size > 1 and self.context_exchange == "heads" else ""
        return f"{engine}{more} {self.ranks}{exchange}"

    def tokens(self, sequence_length: int) -> int:
        """Tokens of a micro-batch on one rank."""
        return self.micro_batch_size * sequence_length // self.context_parallel_size


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank by kind; `peak` is the most that is allocated at once."""

    weights: int
    masters: int
    states: int
    gradients: int
    """Between the end of the last backward and the update."""
    activations: int = 0
    logits: int = 0
    buffers: int = 0
    host: int = 0
    """In host memory (offload); not part of the peak."""
    peak: int = 0

    @property
    def training_state(self) -> int:
        """Weights, masters, optimizer states and gradients."""
        return self.weights + self.masters + self.states + self.gradients

    def as_dict(self) -> dict[str, int]:
        """Bytes by kind, `training_state` included."""
        return asdict(self) | {"training_state": self.training_state}


def layout_of(config: RunConfig, gpus: int) -> Layout:
    """The layout the configuration asks for on `gpus` ranks.

    Raises:
        ValueError: the ranks, the batch or the experts do not divide.
    """
    train, parallel = config.train, config.parallel
    tensor, context, pipeline = parallel.tensor_parallel_size, parallel.context_parallel_size, parallel.pipeline_parallel_size
    count = micro_batches(config, gpus)
    return Layout(
        gpus // (tensor * context * pipeline), tensor, parallel.sequence_parallel, parallel.engine, parallel.zero_stage,
        parallel.offload, train.micro_batch_size, count, train.recompute, 1, context, parallel.context_exchange, pipeline,
        parallel.pipeline_stages // pipeline, parallel.expert_parallel_size,
    )  # fmt: skip


def can_split_experts(config: RunConfig, layout: Layout) -> bool:
    """Whether the ranks of a layout can split the experts as it says; what a configuration asks for in vain, its checks and
    `micro_batches` say in a sentence."""
    size, model = layout.expert_parallel_size, config.model
    if size == 1:
        return True
    divided = bool(model.layers_with_experts) and not model.n_routed_experts % size and not layout.replicas % size
    return divided and (layout.engine == "fold" or layout.zero_stage < 3) and layout.offload == "none"


def portions_of(config: RunConfig, layout: Layout) -> tuple[Portion, ...]:
    """What each pipeline-parallel rank of a layout has of the network.

    Raises:
        ValueError: more stages than layers.
    """
    return portions(
        config.model, config.train.sequence_length, layout.pipeline_parallel_size, layout.pipeline_stages_per_rank
    )  # fmt: skip


def memory(config: RunConfig, layout: Layout, device: str = "cuda") -> Memory:
    """Memory of one rank on a "cuda" or "cpu" device, of a pipeline's ranks that which needs most."""
    found = (memory_of_rank(config, layout, rank, device) for rank in range(layout.pipeline_parallel_size))
    return max(found, key=lambda needed: needed.peak)


def memory_of_rank(config: RunConfig, layout: Layout, rank: int, device: str = "cuda") -> Memory:
    """Memory of one rank on a "cuda" or "cpu" device.

    The peak is the largest of four: in the loss of the last micro-batch, while a block is recomputed, at the end of the
    backward, and in the update.

    Args:
        rank: its place in the pipeline.
    """
    persistent = state(config, layout, rank)
    saved = _activations(config, layout, rank, device)
    gradients, update = _gradient_bytes(config, layout, rank, persistent)
    buffers, when = _buffers(config, layout, rank)
    in_backward, in_update = buffers if when == "backward" else 0, buffers if when == "update" else 0
    constant = persistent.weights + persistent.masters + persistent.states + buffers - in_backward - in_update
    sending = saved.kept  # of the micro-batches that are in flight while the buckets are
    if layout.engine == "fold" and layout.pipeline_schedule == "1f1b":  # the last alone
        sending //= layout.rounds.in_flight(rank)
    in_block = saved.recomputed + max(saved.kept, sending + in_backward)
    backward = gradients.before + max(saved.kept + saved.loss, in_block)
    update += _whole_bytes(config, layout, rank) + in_update
    peak = constant + max(backward, gradients.end + in_backward, persistent.gradients + update)
    return replace(persistent, activations=saved.kept + saved.recomputed, logits=saved.loss, buffers=buffers, peak=peak)


def _activations(config: RunConfig, layout: Layout, rank: int, device: str) -> Activations:
    """What a rank keeps of all micro-batches in flight, with the streams before and behind its stages; what it holds besides in
    the backward of a block, and its loss."""
    model, length, portion = config.model, config.train.sequence_length, portions_of(config, layout)[rank]
    tokens, execution = layout.tokens(length), execution_of(config, layout, device)
    if layout.pipeline_parallel_size == 1:
        return activations(model, tokens, length, execution)
    stages = [activations(model, tokens, length, execution, layers) for layers in portion.stages]
    costs = [stage.kept + streams for stage, streams in zip(stages, _stage_streams(config, layout, rank), strict=True)]
    kept = layout.rounds.most(rank, costs)
    widest = max(block.mlp.local_width for block in planned_blocks(model, portion.layers, layout.tensor_parallel_size))
    gradients = 2 * tokens * widest * element_bytes(config)  # of the mlp's gate and up, where no loss is larger
    if layout.recompute == "selective":  # `recomputed` has the products of matrices, which are kept already; they are more
        gradients = 0
    loss = layout.rounds.most(rank, costs, stages[-1].loss) - kept  # interleaved, less may be in flight then
    kept += MOVING_STREAMS * stream_bytes(config, layout)
    return Activations(kept, max(stage.recomputed for stage in stages) + gradients, loss)


MOVING_STREAMS = 2
"""Streams of a pipeline-parallel rank beside those that it keeps: the gradient that it has got, and that which it has sent."""


def _stage_streams(config: RunConfig, layout: Layout, rank: int) -> list[int]:
    """Bytes of the streams before and behind each of a rank's stages that a forward in flight keeps beside its activations."""
    last = layout.pipeline_stages - 1
    numbers = range(rank, last + 1, layout.pipeline_parallel_size)
    recomputed = layout.recompute in ("selective", "full")  # the first block has kept its input then
    return [stream_bytes(config, layout) * ((stage > 0 and not recomputed) + (stage < last)) for stage in numbers]


def stream_bytes(config: RunConfig, layout: Layout) -> int:
    """Bytes of a micro-batch's residual stream on one rank: of a message between two stages."""
    sliced = layout.tensor_parallel_size if layout.sequence_parallel else 1
    return layout.tokens(config.train.sequence_length) * config.model.hidden_size * element_bytes(config) // sliced


def execution_of(config: RunConfig, layout: Layout, device: str) -> Execution:
    """How a rank of a layout runs the network on a "cuda" or "cpu" device."""
    far = config.position.map.far_region()
    return Execution(
        element_bytes(config), layout.tensor_parallel_size, layout.sequence_parallel, layout.recompute, device,
        config.train.compile, 1 if far is None or far.window >= config.train.sequence_length else 2,
        layout.context_parallel_size, layout.context_exchange, layout.expert_load,
    )  # fmt: skip


def state(config: RunConfig, layout: Layout, rank: int = 0) -> Memory:
    """Weights, masters, optimizer states and gradients of one rank; the other fields are 0.

    Args:
        rank: its place in the pipeline.

    Raises:
        ValueError: a ZeRO stage other than 1, 2, 3.
    """
    held = _held(config, layout, rank)
    elements, states, itemsize, share = held.owned, held.states, element_bytes(config), layout.replicas
    split, experts = itemsize * held.experts, layout.expert_replicas
    copy = itemsize * held.copied
    if layout.engine == "fold":  # a copy's gradient is summed in float32
        return Memory(itemsize * elements + copy + split, 0, itemsize * (states + held.expert_states), 4 * held.copied)
    if layout.zero_stage not in (1, 2, 3):
        raise ValueError(f"zero_stage = {layout.zero_stage} must be 1, 2 or 3")
    weights = itemsize * elements // (share if layout.zero_stage == 3 else 1) + copy
    if layout.zero_hpz_partition_size > 1:
        weights += itemsize * elements // layout.zero_hpz_partition_size
    gradients = _gradient_sums(layout, held, itemsize)
    if layout.offload == "cpu":
        return Memory(weights, 0, 0, gradients, host=(2 * 4 * elements + 4 * states) // share)
    masters = 4 * elements // share + 4 * held.experts // experts
    return Memory(weights + split, masters, 4 * states // share + 4 * held.expert_states // experts, gradients)


def _gradient_sums(layout: Layout, held: "Held", itemsize: int) -> int:
    """Bytes of the gradients of a rank under ZeRO before the update; those of experts that ranks split are float32 sums, which
    stage 2 partitions in every micro-batch."""
    elements, share = held.owned, layout.replicas
    experts = 4 * held.experts // (1 if layout.zero_stage == 1 else layout.expert_replicas)
    if layout.pipeline_parallel_size > 1:  # float32 sums, in stage 1 not partitioned, nor a tied copy's
        return 4 * elements // (1 if layout.zero_stage == 1 else share) + 4 * held.copied + experts
    float32_sum = itemsize == 2 and layout.micro_batches > 1
    if float32_sum and layout.zero_stage == 1 and layout.offload == "none":
        # DeepSpeed's BF16_Optimizer: a float32 sum that is not partitioned, beside the bf16 gradients
        return (4 + itemsize) * elements + experts
    return (4 if float32_sum else itemsize) * elements // share + experts


def whole_update(config: RunConfig, layout: Layout, rank: int = 0) -> WholeUpdate | None:
    """What the whole matrices of an update cost the ranks of one stage in a layout; None if no rule needs any.

    Args:
        rank: their place in the pipeline.
    """
    stage = 0 if layout.engine == "fold" else layout.zero_stage
    portion, ranks = portions_of(config, layout)[rank], (layout.tensor_parallel_size, layout.replicas)
    return plan_whole(config, stage, ranks, portion, layout.expert_parallel_size)


def _whole_bytes(config: RunConfig, layout: Layout, rank: int) -> int:
    """Temporary bytes of the directions of whole matrices.

    Of a batch: its parts, the stack, two iterates, the Gram matrix and the polynomial of it (square matrices: as large); what
    arrives meanwhile, of one round or two; and the largest fragment's direction in float32.
    """
    if (update := whole_update(config, layout, rank)) is None:
        return 0
    batches = 6 + min(update.rounds, 2)
    return update.itemsize * batches * update.batch_elements + 4 * update.largest_piece


@dataclass(frozen=True)
class _Gradients:
    before: int
    """When the last micro-batch begins."""
    end: int
    """At the end of its backward, before all but this rank's partition is freed."""


def _gradient_bytes(config: RunConfig, layout: Layout, rank: int, persistent: Memory) -> tuple[_Gradients, int]:
    """(bytes of gradients over time, temporary bytes of the update)."""
    held, itemsize, sums = _held(config, layout, rank), element_bytes(config), persistent.gradients
    elements, before = held.owned, 4 * held.experts // (1 if layout.zero_stage == 1 else layout.expert_replicas)
    if layout.engine == "fold":
        before = 0 if layout.pipeline_parallel_size > 1 else itemsize * held.largest  # those of a block are freed one by one
        return _Gradients(sums + before, sums + itemsize * held.largest), 0
    several = layout.micro_batches > 1
    update = 8 * elements // layout.replicas if layout.offload == "none" else 0
    rounded = itemsize * held.experts // layout.expert_replicas  # of experts' masters, to be gathered
    update = max(update, rounded)  # one group of masters after the other
    if layout.pipeline_parallel_size > 1:  # a gradient is freed as soon as it is added
        update = max(itemsize * elements // layout.replicas, rounded)  # the sums serve as the masters' gradients
        return _Gradients(sums, sums + (itemsize * held.largest if layout.zero_stage == 1 else 0)), update
    if layout.zero_stage == 1 and sums - before < (4 + itemsize) * elements:
        return _Gradients(before + (itemsize * elements if several else 0), before + itemsize * elements), update
    if layout.zero_stage == 1:
        return _Gradients(sums, sums), max(itemsize * elements, rounded)  # the masters rounded, of all ranks
    return _Gradients(sums if several else before, sums), update


def checkpoint_bytes(config: RunConfig) -> int:
    """Bytes of a checkpoint: weights (float32 masters under zero) and optimizer states, whatever the layout."""
    held = _held(config, Layout(1, 1, False, config.parallel.engine, 1, "none", 1, 1, "none"), 0)
    return (element_bytes(config) if config.parallel.engine == "fold" else 4) * (held.owned + held.states)


@dataclass(frozen=True)
class Held:
    """Elements on one tensor- and pipeline-parallel rank."""

    owned: int
    """Of all parameters but a copy, and but the experts that ranks split."""
    copied: int
    """Of the last rank's copy of a tied embedding."""
    states: int
    largest: int
    """Of the largest parameter; a stack of experts is one."""
    experts: int
    """Of experts that ranks split, on one of them."""
    expert_states: int


def _held(config: RunConfig, layout: Layout, rank: int) -> Held:
    return held_elements(config, layout, portions_of(config, layout)[rank])


def held_elements(config: RunConfig, layout: Layout, portion: Portion) -> Held:
    """Elements on a rank of a layout with these layers."""
    settings = settings_of(config)
    return _held_under(config.model, settings, layout.tensor_parallel_size, portion, layout.expert_parallel_size)


@lru_cache(maxsize=1024)
def _held_under(model: ModelConfig, settings: str, size: int, portion: Portion, expert_parallel_size: int) -> Held:
    copied = copied_elements(model, size, portion)
    common, stacks = stored_elements(model, size, portion, expert_parallel_size)
    by_layer, own = _states_by_layer(model, settings, size), model.n_routed_experts // expert_parallel_size
    layers = [by_layer[key] for key in portion.keys if key in by_layer]
    states, split = sum(other for other, _ in layers), sum(sum(experts[:own]) for _, experts in layers)
    largest = max(copied, *common.values(), *stacks.values())
    if not stacks:
        states, split = states + split, 0
    return Held(sum(common.values()), copied, states, largest, sum(stacks.values()), split)


@lru_cache(maxsize=64)
def _states_by_layer(model: ModelConfig, settings: str, size: int) -> dict[int | str, tuple[int, list[int]]]:
    """Of each layer, as `elements_by_layer` names them, elements of optimizer states: of all but experts, and of each expert.
    Kept, since the experts of a large network are tens of thousands of tensors."""
    states, specs, found = states_under(model, settings), parameter_specs(model), dict[int | str, tuple[int, list[int]]]()
    for key, elements in elements_by_layer(model, size, False).items():
        others, experts = 0, [0] * model.n_routed_experts
        for name, count in elements.items():
            if specs[name].part == "experts":
                experts[int(name.split(".")[-3])] += count * states[name]
            else:
                others += count * states[name]
        found[key] = (others, experts)
    return found


def state_elements(config: RunConfig, elements: Mapping[str, int]) -> int:
    """Elements of the optimizer states of these parameters, as `states_per_element` counts.

    Args:
        elements: of each parameter, by name.
    """
    states = states_per_element(config)
    return sum(count * states[name] for name, count in elements.items())


def element_bytes(config: RunConfig) -> int:
    """Bytes per element of weights and activations in train.precision."""
    return 4 if config.train.precision == "fp32" else 2


def _buffers(config: RunConfig, layout: Layout, rank: int) -> tuple[int, Literal["always", "backward", "update"]]:
    """Bytes of the buckets of collectives, and of the weights that ZeRO-3 has gathered; and when they are held. Those of the
    backward are filled when the logits are freed."""
    portion, limit, size = (
        portions_of(config, layout)[rank],
        config.parallel.reduce_bucket_elements,
        layout.tensor_parallel_size,
    )
    itemsize, pipelined = element_bytes(config), layout.pipeline_parallel_size > 1
    held, expert = _held(config, layout, rank), layout.expert_parallel_size
    bucket = min(limit, held.owned)
    if layout.replicas == 1:
        return 0, "always"
    if layout.engine == "fold":
        return _fold_buckets(config.model, size, portion, expert, limit), "backward"
    if layout.zero_stage == 1 and pipelined:
        return 4 * bucket, "update"
    if layout.zero_stage == 1:
        return itemsize * bucket, "always"
    experts = _expert_buckets(config, layout, portion)
    if layout.zero_stage == 2 and pipelined:
        stages = stage_elements(config.model, size, portion, True, expert)
        return max(_bucketed(stage[::-1], limit, itemsize) for stage in stages) + experts, "backward"
    if layout.zero_stage == 2:
        return 2 * itemsize * bucket + experts, "always"
    live = max(STAGE_3["stage3_max_live_parameters"], held.largest)
    return itemsize * (bucket + min(held.owned, live)), "always"


@lru_cache(maxsize=1024)
def _fold_buckets(model: ModelConfig, size: int, portion: Portion, expert_parallel_size: int, limit: int) -> int:
    """Of fold's momentum, expert by expert."""
    return _bucketed([*owned_elements(model, size, portion, expert_parallel_size).values()][::-1], limit)


def _expert_buckets(config: RunConfig, layout: Layout, portion: Portion) -> int:
    """Of the gradients of experts that ranks split, which ZeRO 2 averages while the backward runs."""
    _, stacks = stored_elements(config.model, layout.tensor_parallel_size, portion, layout.expert_parallel_size)
    if not stacks or layout.expert_replicas == 1:
        return 0
    return _bucketed([*stacks.values()][::-1], config.parallel.reduce_bucket_elements, element_bytes(config))


def _bucketed(sizes: list[int], limit: int, waiting_itemsize: int = 0) -> int:
    """Most bytes that the float32 buckets hold at once, of IN_FLIGHT consecutive ones, and of what waits for one to be full.

    Args:
        sizes: elements of each parameter, in the order of the backward.
        limit: elements of a bucket.
        waiting_itemsize: bytes of an element that waits in a tensor of its own.
    """
    buckets = [sum(sizes[index] for index in members) for members in bucket_indexes(sizes, limit)]
    in_flight = max(sum(buckets[start : start + IN_FLIGHT]) for start in range(len(buckets)))
    return 4 * in_flight + waiting_itemsize * max(buckets)
