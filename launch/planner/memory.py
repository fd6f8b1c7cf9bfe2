"""Memory of one rank, by kind, for any layout: arithmetic on the configuration, no hardware.

`benchmarks/plan_check.py` compares it with the live engines.
"""

from dataclasses import asdict, dataclass, replace
from typing import Literal

from launch.batches import micro_batches
from launch.config import RunConfig
from launch.planner.exchange import WholeUpdate, plan_whole
from launch.planner.rules import assigned_rules
from model.activations import activations
from model.parallel.context import ContextExchange
from model.sizes import elements_per_rank
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

    @property
    def gpus(self) -> int:
        """Ranks in all."""
        return self.replicas * self.tensor_parallel_size

    @property
    def replicas(self) -> int:
        """Ranks with the same weights, which see different tokens: ZeRO cuts for them, gradients are summed over them."""
        return self.data_parallel_size * self.context_parallel_size

    @property
    def replica_group(self) -> str:
        """The name of their group: that of the axis, where they lie on one alone."""
        if self.context_parallel_size == 1:
            return "data"
        return "context" if self.data_parallel_size == 1 else "replicas"

    @property
    def ranks(self) -> str:
        """Tensor-parallel x data-parallel size: "2x4"; where sequences are shared, tensor x context x data: "2x2x4"."""
        context = f"{self.context_parallel_size}x" if self.context_parallel_size > 1 else ""
        return f"{self.tensor_parallel_size}x{context}{self.data_parallel_size}"

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
        ValueError: the ranks or the batch do not divide.
    """
    train, parallel = config.train, config.parallel
    tensor, context = parallel.tensor_parallel_size, parallel.context_parallel_size
    count = micro_batches(config, gpus)
    return Layout(
        gpus // (tensor * context), tensor, parallel.sequence_parallel, parallel.engine, parallel.zero_stage, parallel.offload,
        train.micro_batch_size, count, train.recompute, 1, context, parallel.context_exchange,
    )  # fmt: skip


def memory(config: RunConfig, layout: Layout, device: str = "cuda") -> Memory:
    """Memory of one rank on a "cuda" or "cpu" device.

    The peak is the largest of four: in the loss of the last micro-batch, while a block is recomputed, at the end of the
    backward, and in the update.
    """
    persistent = state(config, layout)
    length = config.train.sequence_length
    saved = activations(config.model, layout.tokens(length), length, execution_of(config, layout, device))
    gradients, update = _gradient_bytes(config, layout, persistent)
    buffers = _buffers(config, layout)
    backward_buffers = buffers if layout.engine == "fold" else 0  # filled by the last backward, when the logits are freed
    constant = persistent.weights + persistent.masters + persistent.states + buffers - backward_buffers
    in_backward = gradients.before + saved.kept + max(saved.loss, saved.recomputed + backward_buffers)
    update += _whole_bytes(config, layout)
    peak = constant + max(in_backward, gradients.end + backward_buffers, persistent.gradients + update)
    return replace(persistent, activations=saved.kept + saved.recomputed, logits=saved.loss, buffers=buffers, peak=peak)


def execution_of(config: RunConfig, layout: Layout, device: str) -> Execution:
    """How a rank of a layout runs the network on a "cuda" or "cpu" device."""
    far = config.position.map.far_region()
    return Execution(
        element_bytes(config), layout.tensor_parallel_size, layout.sequence_parallel, layout.recompute, device,
        config.train.compile, 1 if far is None or far.window >= config.train.sequence_length else 2,
        layout.context_parallel_size, layout.context_exchange,
    )  # fmt: skip


def state(config: RunConfig, layout: Layout) -> Memory:
    """Weights, masters, optimizer states and gradients of one rank; the other fields are 0.

    Raises:
        ValueError: a ZeRO stage other than 1, 2, 3.
    """
    elements, states, _ = _element_counts(config, layout)
    itemsize, share = element_bytes(config), layout.replicas
    if layout.engine == "fold":
        return Memory(itemsize * elements, 0, itemsize * states, 0)
    if layout.zero_stage not in (1, 2, 3):
        raise ValueError(f"zero_stage = {layout.zero_stage} must be 1, 2 or 3")
    weights = itemsize * elements // (share if layout.zero_stage == 3 else 1)
    if layout.zero_hpz_partition_size > 1:
        weights += itemsize * elements // layout.zero_hpz_partition_size
    float32_sum = itemsize == 2 and layout.micro_batches > 1
    if float32_sum and layout.zero_stage == 1 and layout.offload == "none":
        # DeepSpeed's BF16_Optimizer: a float32 sum that is not partitioned, beside the bf16 gradients
        gradients = (4 + itemsize) * elements
    else:
        gradients = (4 if float32_sum else itemsize) * elements // share
    if layout.offload == "cpu":
        return Memory(weights, 0, 0, gradients, host=(2 * 4 * elements + 4 * states) // share)
    return Memory(weights, 4 * elements // share, 4 * states // share, gradients)


def whole_update(config: RunConfig, layout: Layout) -> WholeUpdate | None:
    """What the whole matrices of an update cost in a layout; None if no rule needs any."""
    stage = 0 if layout.engine == "fold" else layout.zero_stage
    return plan_whole(config, stage, layout.tensor_parallel_size, layout.replicas)


def _whole_bytes(config: RunConfig, layout: Layout) -> int:
    """Temporary bytes of the directions of whole matrices.

    Of a batch: its parts, the stack, two iterates, the Gram matrix and the polynomial of it (square matrices: as large); what
    arrives meanwhile, of one round or two; and the largest fragment's direction in float32.
    """
    if (update := whole_update(config, layout)) is None:
        return 0
    batches, fragment = 6 + min(update.rounds, 2), max(piece.length for matrix in update.matrices for piece in matrix.pieces)
    return update.itemsize * batches * update.batch_elements + 4 * fragment


@dataclass(frozen=True)
class _Gradients:
    before: int
    """When the last micro-batch begins."""
    end: int
    """At the end of its backward, before all but this rank's partition is freed."""


def _gradient_bytes(config: RunConfig, layout: Layout, persistent: Memory) -> tuple[_Gradients, int]:
    """(bytes of gradients over time, temporary bytes of the update)."""
    elements, _, largest = _element_counts(config, layout)
    itemsize = element_bytes(config)
    if layout.engine == "fold":
        return _Gradients(itemsize * largest, itemsize * largest), 0
    several = layout.micro_batches > 1
    update = 8 * elements // layout.replicas if layout.offload == "none" else 0
    if layout.zero_stage == 1 and persistent.gradients < (4 + itemsize) * elements:
        return _Gradients(itemsize * elements if several else 0, itemsize * elements), update
    if layout.zero_stage == 1:
        return _Gradients(persistent.gradients, persistent.gradients), 0
    return _Gradients(persistent.gradients if several else 0, persistent.gradients), update


def checkpoint_bytes(config: RunConfig) -> int:
    """Bytes of a checkpoint: weights (float32 masters under zero) and optimizer states, whatever the layout."""
    whole = Layout(1, 1, False, config.parallel.engine, 1, "none", 1, 1, "none")
    elements, states, _ = _element_counts(config, whole)
    return (element_bytes(config) if config.parallel.engine == "fold" else 4) * (elements + states)


def _element_counts(config: RunConfig, layout: Layout) -> tuple[int, int, int]:
    """Elements on a tensor-parallel rank: (of all parameters, of optimizer states, of the largest parameter)."""
    elements = elements_per_rank(config.model, layout.tensor_parallel_size)
    return sum(elements.values()), state_elements(config, layout.tensor_parallel_size), max(elements.values())


def state_elements(config: RunConfig, tensor_parallel_size: int) -> int:
    """Elements of optimizer states on a tensor-parallel rank; those per row or per tensor are too few to count."""
    elements = elements_per_rank(config.model, tensor_parallel_size)
    per_element = {
        name: sum(granularity == "element" for granularity in choice.rule.states.values())
        for name, choice in assigned_rules(config).items()
    }
    return sum(elements[name] * states for name, states in per_element.items())


def element_bytes(config: RunConfig) -> int:
    """Bytes per element of weights and activations in train.precision."""
    return 4 if config.train.precision == "fp32" else 2


def _buffers(config: RunConfig, layout: Layout) -> int:
    """Bytes of the buckets of collectives, and of the weights that ZeRO-3 has gathered."""
    elements, _, largest = _element_counts(config, layout)
    itemsize, bucket = element_bytes(config), min(config.parallel.reduce_bucket_elements, elements)
    if layout.replicas == 1:
        return 0
    if layout.engine == "fold":
        sizes = [*elements_per_rank(config.model, layout.tensor_parallel_size).values()]
        return 4 * _in_flight(sizes[::-1], config.parallel.reduce_bucket_elements)
    if layout.zero_stage == 1:
        return itemsize * bucket
    if layout.zero_stage == 2:
        return 2 * itemsize * bucket
    return itemsize * (bucket + min(elements, max(STAGE_3["stage3_max_live_parameters"], largest)))


def _in_flight(sizes: list[int], limit: int) -> int:
    """Most elements that fold's buckets hold at once: of IN_FLIGHT consecutive ones.

    Args:
        sizes: elements of each parameter, in the order of the backward.
        limit: elements of a bucket.
    """
    buckets = [sum(sizes[index] for index in members) for members in bucket_indexes(sizes, limit)]
    return max(sum(buckets[start : start + IN_FLIGHT]) for start in range(len(buckets)))
