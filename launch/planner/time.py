"""Time of a step on accelerators from their data sheets: a documented model, not a measurement.

A step is the sum of matrix products, attention, pointwise memory traffic, the optimizer, exposed communication and a pipeline's
bubble.
Every constant that is not on a data sheet is in `Assumptions`; `benchmarks/scaling.py` compares the model with published
runs and prints its error on each.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import log2

from launch.config import RunConfig
from launch.planner.communication import (
    EXCHANGES,
    EXPERT_EXCHANGES,
    LATE,
    STREAMS,
    TO_EXPERTS,
    WEIGHT_GATHER,
    Message,
    Op,
    update_messages,
)
from launch.planner.memory import Layout, element_bytes, execution_of, held_elements, portions_of, whole_update
from launch.planner.pipeline import Portion
from model.block import TransformerBlock
from model.config import ModelConfig
from model.feed_forward.base import Routed
from model.flops import attention_flops_per_token, matrix_flops_per_token
from model.sizes import planned_blocks, planned_network
from model.sublayer import Execution


@dataclass(frozen=True)
class Accelerator:
    """One device, from its data sheet. Bandwidths are in bytes/s, one direction, per device."""

    name: str
    memory_bytes: float
    matrix_flops: float
    """Peak of dense bf16 matrix products in FLOP/s."""
    float32_flops: float
    """Peak of float32 matrix products in FLOP/s without TF32, which torch leaves off: the data sheet's plain FP32."""
    memory_bandwidth: float
    node_bandwidth: float
    """To the other devices of the node."""
    network_bandwidth: float
    """Per device: its share of the node's network."""
    sustained: float = 0.7
    """Share of the peak that large matrix products reach within the power limit; fitted for bf16."""
    per_node: int = 8

    def peak_flops(self, precision: str) -> float:
        """Peak FLOP/s of matrix products in train.precision, "bf16" or "fp32"."""
        return self.float32_flops if precision == "fp32" else self.matrix_flops

    @property
    def kind(self) -> str:
        """torch's device type: "cpu" or "cuda"."""
        return "cpu" if self.name == "cpu" else "cuda"


# NVIDIA's data sheets of the SXM boards (B200: HGX), of the L40S, and of the RTX 4090 (Ada architecture paper, appendix A).
ACCELERATORS = {
    accelerator.name: accelerator
    for accelerator in (
        Accelerator("h100", 80e9, 989e12, 67e12, 3.35e12, 450e9, 50e9, sustained=0.64),
        Accelerator("h200", 141e9, 989e12, 67e12, 4.8e12, 450e9, 50e9, sustained=0.80),
        Accelerator("b200", 180e9, 2250e12, 75e12, 7.7e12, 900e9, 50e9),
        Accelerator("a100", 80e9, 312e12, 19.5e12, 2.04e12, 300e9, 25e9, sustained=0.72),
        Accelerator("a100-40", 40e9, 312e12, 19.5e12, 1.56e12, 300e9, 25e9, sustained=0.72),
        Accelerator("l40s", 48e9, 362e12, 91.6e12, 0.864e12, 32e9, 12.5e9),
        Accelerator("rtx4090", 24e9, 165e12, 82.6e12, 1.01e12, 32e9, 3.1e9, per_node=2),
        Accelerator("cpu", 16e9, 1.2e12, 0.2e12, 20e9, 5e9, 1.25e9, sustained=0.5, per_node=2),
    )
}


def accelerator(name: str) -> Accelerator:
    """The accelerator of that name.

    Raises:
        ValueError: not in the table.
    """
    if name not in ACCELERATORS:
        raise ValueError(f"--gpu {name} is not known; choose one of {', '.join(ACCELERATORS)}")
    return ACCELERATORS[name]


@dataclass(frozen=True)
class Assumptions:
    """What data sheets do not say. The values were fitted to the runs that `benchmarks/scaling.py` marks."""

    attention_efficiency: float = 0.45
    """Share of the peak that causal attention reaches, counting the scores on and below the diagonal."""
    memory_efficiency: float = 0.8
    """Share of the memory bandwidth that pointwise kernels and the optimizer reach."""
    link_efficiency: float = 0.8
    """Share of a link's bandwidth that the large collectives of data parallelism reach."""
    tensor_link_efficiency: float = 0.35
    """The same for tensor parallelism, whose collectives sit between one matrix product and the next, and for context
    parallelism, whose collectives sit beside attention."""
    pointwise_passes: float = 1.0
    """Memory traffic between matrix products relative to fused kernels; about 2.5 in eager mode."""
    narrow_columns: float = 256.0
    """Width of a rank's slice of the mlp at which matrix products reach half of `sustained`."""
    expert_rows: float = 64.0
    """Rows that the products of an expert take besides their own: half a tile of 128, of which the last is seldom full."""
    hop_seconds: float = 3e-6
    """Latency of one hop of a ring or tree, averaged over hops inside and between nodes."""
    message_seconds: float = 100e-6
    """Latency of starting one collective between nodes, and of waiting for the slowest rank; a tenth inside a node."""
    hidden_share: float = 0.8
    """Share of the computation that can overlap sums of gradients and gathers of weights."""
    contention: float = 0.3
    """Seconds by which a second of overlapped communication slows the computation beside it."""
    selective_passes: float = 3.0
    """Matrix products with selective recomputation, in forward passes; 3.5 if every other one is recomputed."""
    broadcast_seconds: float = 0.0
    """Above 0: updated weights return by one broadcast per rank, with this latency each, instead of one gather."""


@dataclass(frozen=True)
class Traffic:
    """All communication of one kind in a step."""

    what: str
    op: str
    group: str
    ranks: int
    link: str
    bytes: float
    """Sent per rank."""
    messages: int
    seconds: float
    hidden: bool
    """It overlaps computation."""


@dataclass(frozen=True)
class StepTime:
    """Predicted seconds of one optimizer update."""

    matrices: float
    attention: float
    pointwise: float
    optimizer: float
    exposed: float
    """Communication that does not overlap computation."""
    tokens: float
    """Tokens per update, over all ranks."""
    gpus: int
    traffic: tuple[Traffic, ...] = field(default=())
    exchange: float = 0.0
    """What context-parallel ranks exchange for attention takes of `exposed`."""
    whole: "WholeTime | None" = None
    """What whole matrices take of `optimizer` and `exposed`; None without any."""
    bubble: float = 0.0
    """In which a pipeline-parallel rank has nothing to compute."""
    experts: float = 0.0
    """The products of routed experts take of `matrices`."""
    dispatch: float = 0.0
    """What ranks that split experts exchange takes of `exposed`."""

    @property
    def compute(self) -> float:
        """Seconds of forward and backward."""
        return self.matrices + self.attention + self.pointwise

    @property
    def seconds(self) -> float:
        """Seconds of the update."""
        return self.compute + self.optimizer + self.exposed + self.bubble

    @property
    def tokens_per_second_per_gpu(self) -> float:
        """Throughput per device."""
        return self.tokens / self.seconds / self.gpus


@dataclass(frozen=True)
class WholeTime:
    """Directions of whole matrices in an update."""

    flops: float
    """Of all ranks."""
    compute: float
    """Seconds of the rank that has most to compute."""
    imbalance: float
    """Its operations over the mean."""
    exchange: float
    """Seconds in which parts of matrices travel."""
    exposed: float
    """Of these, seconds that do not overlap `compute`."""
    bytes: float
    """Sent by all ranks together."""
    float32: bool
    """In which it is computed and sent, not in bf16."""

    @property
    def seconds(self) -> float:
        """That an update is longer for them."""
        return self.compute + self.exposed


def predict(
    config: RunConfig,
    layout: Layout,
    device: Accelerator,
    assumed: Assumptions = Assumptions(),
    shard_ranks: int | None = None,
    parts: list[Message] | None = None,
) -> StepTime:
    """Time of a step, part by part; in a pipeline of the rank whose stages take longest, for which the others wait.

    Args:
        shard_ranks: ranks that share one copy of the optimizer states; default all with the same weights, which is what
            DeepSpeed's stages 1 and 2 do. Smaller: the states are copied between such groups (hierarchical sharding).
        parts: collectives of an update; default tiglon's own. Another trainer may send something else.
    """
    portions = portions_of(config, layout)
    computed = [_computation(config, layout, device, assumed, portion) for portion in portions]
    rank = max(range(len(portions)), key=lambda rank: sum(computed[rank]))
    (matrices, attention, pointwise), portion = computed[rank], portions[rank]
    experts, beside = _expert_seconds(config, layout, device, assumed, portion)
    parts = update_messages(config, layout, device.kind, rank) if parts is None else parts
    traffic = tuple(_traffic(parts, layout, device, assumed))
    compute = matrices + attention + pointwise
    exposed = _collectives_exposed(traffic, compute, assumed)
    exchange = _exchange_exposed(traffic, attention, layout, assumed)
    dispatch = _dispatch_exposed(traffic, beside, layout, assumed)
    waiting = sum(part.seconds for part in traffic if part.group == "tensor") + exchange + dispatch
    bubble = layout.rounds.bubble * (compute + waiting)
    exposed += _streams_exposed(traffic, compute, layout, assumed)
    moved = _optimizer_bytes(config, layout, shard_ranks or layout.replicas, portion)
    optimizer = moved / (device.memory_bandwidth * assumed.memory_efficiency)
    if whole := _whole_time(config, layout, device, assumed, traffic):
        optimizer, exposed = optimizer + whole.compute, exposed + whole.exposed
    sequences = layout.micro_batch_size * layout.micro_batches * layout.data_parallel_size
    exposed, tokens = exposed + exchange + dispatch, float(sequences * config.train.sequence_length)
    return StepTime(
        matrices, attention, pointwise, optimizer, exposed, tokens, layout.gpus, traffic, exchange, whole, bubble, experts,
        dispatch,
    )  # fmt: skip


def _collectives_exposed(traffic: Sequence[Traffic], compute: float, assumed: Assumptions) -> float:
    """Seconds of collectives that overlap no computation, but for those of exchanges and streams."""
    hidden = sum(part.seconds for part in traffic if part.hidden and part.op != "send" and part.what not in LATE)
    apart = (*EXCHANGES, *STREAMS, *EXPERT_EXCHANGES)
    exposed = sum(part.seconds for part in traffic if not part.hidden and part.what not in apart)
    return exposed + max(hidden - assumed.hidden_share * compute, assumed.contention * hidden)


def _computation(
    config: RunConfig, layout: Layout, device: Accelerator, assumed: Assumptions, portion: Portion
) -> tuple[float, float, float]:  # fmt: skip
    """Seconds of matrix products, of attention and of pointwise work. The causal scores of a rank's two chunks are the same
    share of a sequence's on all context-parallel ranks."""
    model, length, size = config.model, config.train.sequence_length, layout.tensor_parallel_size
    tokens, layers = layout.tokens(length) * layout.micro_batches, portion.layers
    width = _product_width(model, size)
    passes = _passes(layout, assumed)
    peak = device.peak_flops(config.train.precision)
    matrix_rate = peak * device.sustained * width / (width + assumed.narrow_columns)
    per_token = matrix_flops_per_token(model, layers) - sum(flops for _, flops in _routed_flops(model, layers))
    matrix_flops = passes * per_token * tokens + _expansion_flops(config, layout, passes, portion)
    experts, _ = _expert_seconds(config, layout, device, assumed, portion)
    attention_rate = peak * assumed.attention_efficiency
    attention_flops = passes * attention_flops_per_token(model, length, True, layers) * tokens
    recompute_factor = {"selective": 4 / 3, "full": 4 / 3}.get(layout.recompute, 1.0)
    pointwise = recompute_factor * assumed.pointwise_passes * tokens * _pointwise_bytes(config, layout, portion)
    memory_rate = device.memory_bandwidth * assumed.memory_efficiency
    return matrix_flops / size / matrix_rate + experts, attention_flops / size / attention_rate, pointwise / memory_rate


def _passes(layout: Layout, assumed: Assumptions) -> float:
    """Matrix products of an update in forward passes, those of routed experts apart."""
    return {"selective": assumed.selective_passes, "full": 4.0}.get(layout.recompute, 3.0)


@lru_cache(maxsize=1024)
def _routed_flops(model: ModelConfig, layers: tuple[int, ...]) -> list[tuple[Routed, float]]:
    """Of each of these layers with experts: what they are, and forward FLOPs per token."""
    found = (block.mlp.routed for block in planned_blocks(model, layers))
    return [(routed, 2.0 * routed.copies * routed.elements) for routed in found if routed is not None]


def _expert_seconds(
    config: RunConfig, layout: Layout, device: Accelerator, assumed: Assumptions, portion: Portion
) -> tuple[float, float]:  # fmt: skip
    """Seconds of the products of routed experts in an update, and of those of shared experts beside which copies of tokens
    travel.

    Every expert multiplies the few rows that a micro-batch sends it. It takes as long as these rows and some more, or as long
    as its weights take to be read, whichever is longer.
    """
    model, size, length = config.model, layout.tensor_parallel_size, config.train.sequence_length
    if not (layers := _routed_flops(model, portion.layers)):
        return 0.0, 0.0
    routed, per_token = layers[0]
    width, experts = model.moe_intermediate_size / size, routed.experts // layout.expert_parallel_size
    rate = device.peak_flops(config.train.precision) * device.sustained * width / (width + assumed.narrow_columns)
    tokens = layout.tokens(length)
    flops = per_token * tokens * layout.expert_load / size
    rows = tokens * routed.copies * layout.expert_load / experts
    read = experts * routed.elements / size * element_bytes(config) / (device.memory_bandwidth * assumed.memory_efficiency)
    once = max(flops / rate * (1 + assumed.expert_rows / rows), read)
    passes = (
        4.0 if layout.recompute in ("full", "experts") else assumed.selective_passes if layout.recompute == "selective" else 3.0
    )
    times = layout.micro_batches * len(layers)
    return passes * times * once, _passes(layout, assumed) * times * routed.shared_flops * tokens / size / rate


def _dispatch_exposed(traffic: Sequence[Traffic], beside: float, layout: Layout, assumed: Assumptions) -> float:
    """Seconds of what ranks that split experts exchange that overlap no computation: copies of tokens travel while shared
    experts compute, and slow them; results are waited for. The busiest rank gets and returns `expert_load` times the mean."""
    copies = layout.expert_load * sum(part.seconds for part in traffic if part.what == TO_EXPERTS)
    exposed = sum(part.seconds for part in traffic if part.what in EXPERT_EXCHANGES and part.what != TO_EXPERTS)
    return layout.expert_load * exposed + max(copies - beside, assumed.contention * copies)


def _expansion_flops(config: RunConfig, layout: Layout, passes: float, portion: Portion) -> float:
    """FLOPs of an update, over tensor-parallel ranks, in which a context-parallel rank projects up the latents of others that
    it has gathered: the first rank all of a sequence, rank r of n without r / 2n of it, but in every layer all wait for the
    slowest. In eager mode selective recomputation repeats them."""
    if layout.context_parallel_size == 1 or layout.context_exchange == "heads":
        return 0.0
    per_token = sum(block.self_attn.expand_flops() for block in planned_blocks(config.model, portion.layers))
    repeated = passes + (layout.recompute == "selective" and not config.train.compile)
    own = layout.tokens(config.train.sequence_length) * layout.micro_batches
    return per_token * own * (repeated * layout.context_parallel_size - passes)


def _streams_exposed(traffic: Sequence[Traffic], compute: float, layout: Layout, assumed: Assumptions) -> float:
    """Seconds of what stages send each other that overlap no computation: the messages that ranks wait for, if they are sent
    as soon as there is something to send and received while the rank computes; of the others what does not fit beside the
    computation, or slows it."""
    streams = [part for part in traffic if part.what in STREAMS]
    total, messages = sum(part.seconds for part in streams), sum(part.messages for part in streams)
    waited = layout.rounds.waits * total / max(1, messages)
    others = max(0.0, total - waited)
    return waited + max(others - assumed.hidden_share * compute, assumed.contention * others)


def _exchange_exposed(traffic: Sequence[Traffic], attention: float, layout: Layout, assumed: Assumptions) -> float:
    """Seconds of what context-parallel ranks exchange that overlap no computation.

    The second half of the keys arrives while the early chunk attends. Of n ranks the first has the least to do meanwhile, one
    of 4 n parts of its scores, and the others wait for it in the next layer.
    """
    late = sum(part.seconds for part in traffic if part.what in LATE)
    early = attention / (4 * layout.context_parallel_size)
    return sum(part.seconds for part in traffic if part.what in EXCHANGES and part.what not in LATE) + max(
        late - early, assumed.contention * late
    )


def _whole_time(
    config: RunConfig, layout: Layout, device: Accelerator, assumed: Assumptions, traffic: tuple[Traffic, ...]
) -> WholeTime | None:  # fmt: skip
    """Seconds of whole matrices: an update waits for its most loaded rank. The first round's pieces and the last one's
    directions travel while nothing else is left to do, the others while matrices are computed."""
    found = [whole_update(config, layout, rank) for rank in range(layout.pipeline_parallel_size)]
    if not (updates := [update for update in found if update is not None]):
        return None
    most = max(updates, key=lambda update: update.most_loaded_flops)
    rate = device.peak_flops("fp32" if most.itemsize == 4 else "bf16") * device.sustained
    flops, compute = sum(update.flops for update in updates), most.most_loaded_flops / rate
    exchange = sum(part.seconds for part in traffic if part.op == "send" and part.hidden)
    exposed = max(exchange / max(1, most.rounds), exchange - assumed.hidden_share * compute)
    sent = sum(sum(update.to_owners.bytes_by_rank) + sum(update.back.bytes_by_rank) for update in updates)
    imbalance = most.most_loaded_flops * layout.gpus / flops
    return WholeTime(flops, compute, imbalance, exchange, exposed, sent, most.itemsize == 4)


@lru_cache(maxsize=64)
def _product_width(model: ModelConfig, tensor_parallel_size: int) -> float:
    """Columns of a rank's products in the mlps, on average over the blocks; of experts those that a token passes together."""
    return sum(map(_width, planned_network(model, tensor_parallel_size).blocks)) / model.num_hidden_layers


def _width(block: TransformerBlock) -> float:
    """Columns of the mlp's products that a token passes."""
    mlp = block.mlp
    if mlp.routed is None:
        return mlp.local_width
    return mlp.local_width * (mlp.routed.copies + mlp.routed.shared_flops / (2.0 * mlp.routed.elements))


def _pointwise_bytes(config: RunConfig, layout: Layout, portion: Portion) -> float:
    """Bytes per token that fused norms, rotary embeddings, activations and the loss move (three passes)."""
    model, size, itemsize = config.model, layout.tensor_parallel_size, element_bytes(config)
    elements = _pointwise_elements(model, size, portion.layers, execution_of(config, layout, "cuda"))
    return 3 * itemsize * elements + (planned_network(model, size).head.loss_traffic() if portion.last else 0.0)


@lru_cache(maxsize=4096)
def _pointwise_elements(model: ModelConfig, size: int, layers: tuple[int, ...], execution: Execution) -> float:
    return sum(block.pointwise_elements(execution) for block in planned_blocks(model, layers, size))


def _optimizer_bytes(config: RunConfig, layout: Layout, shard_ranks: int, portion: Portion) -> float:
    """Bytes that the optimizer reads and writes per update."""
    held = held_elements(config, layout, portion)
    elements = held.owned + held.experts
    if layout.engine == "fold":
        # gradients are added to the momentum in every micro-batch; then one pass over weights and momentum
        itemsize, moved = element_bytes(config), 3.0 * layout.micro_batches + 4.0
        # the momentum is copied into float32 buckets, and these are divided by the ranks and rounded back into it
        averaged = 2.0 * itemsize + 16.0 if layout.replicas > 1 else 0.0
        return elements * (itemsize * moved + averaged)
    summing = 6.0 * layout.micro_batches if layout.micro_batches > 1 else 0.0
    once = 12.0 + element_bytes(config)
    shared = (held.owned * once + 8.0 * held.states) / shard_ranks
    return shared + (held.experts * once + 8.0 * held.expert_states) / layout.expert_replicas + elements * summing


def _traffic(parts: list[Message], layout: Layout, device: Accelerator, assumed: Assumptions) -> Iterator[Traffic]:
    """Seconds of each kind of collective."""
    members = max(1, device.per_node // layout.tensor_parallel_size)
    apart = max(1, members // layout.context_parallel_size)
    waiting = replace(assumed, link_efficiency=assumed.tensor_link_efficiency)
    for part in parts:
        if part.op in ("send", "broadcast"):
            seconds, link = _sending(part, layout, device, assumed)
            yield Traffic(
                part.what, part.op, part.group, part.ranks, link, part.bytes_sent, part.messages, seconds, part.hidden
            )
            continue
        # the ranks of a tensor-parallel group share a node; copies of a shard are on different nodes
        inside = {
            "tensor": device.per_node, "world": device.per_node, "copies": 1, "data": apart,
            "expert replicas": max(1, members // layout.expert_parallel_size),
            "pipeline": max(1, device.per_node // layout.stage_ranks),
        }.get(part.group, members)  # fmt: skip
        efficiencies = waiting if part.group in ("tensor", "experts") or part.what in EXCHANGES else assumed
        seconds, link = _collective(part.op, part.bytes / part.messages, part.ranks, inside, device, efficiencies)
        seconds = seconds * part.messages + (assumed.broadcast_seconds * part.ranks if part.what == WEIGHT_GATHER else 0.0)
        yield Traffic(part.what, part.op, part.group, part.ranks, link, part.bytes_sent, part.messages, seconds, part.hidden)


def _sending(part: Message, layout: Layout, device: Accelerator, assumed: Assumptions) -> tuple[float, str]:
    """(seconds, link) of the messages of the rank that sends most: over its own link to the others of its node, or, where ranks
    are on several, over its own share of the network. What travels together starts once, messages between stages one by one."""
    inside = (layout.stage_ranks if part.group == "stage" else layout.gpus) <= device.per_node
    bandwidth = (device.node_bandwidth if inside else device.network_bandwidth) * assumed.link_efficiency
    starts = 1 if part.hidden else part.messages
    latency = starts * assumed.message_seconds * (0.1 if inside else 1.0) + part.messages * assumed.hop_seconds
    return part.bytes_sent / bandwidth + latency, "inside a node" if inside else "between nodes"


def _collective(
    op: Op, volume: float, ranks: int, members: int, device: Accelerator, assumed: Assumptions
) -> tuple[float, str]:
    """(seconds, link) of one collective.

    Args:
        volume: bytes of the full tensor.
        members: ranks of the group on one node; each adds its share of the node's network.
    """
    if ranks == 1:
        return 0.0, "none"
    inside = ranks <= members
    share = min(members, ranks)
    bandwidth = device.node_bandwidth if inside else min(device.node_bandwidth, device.network_bandwidth * share)
    sent = (2.0 if op == "all-reduce" else 1.0) * volume * (ranks - 1) / ranks
    if op == "all-to-all" and not inside:  # to the ranks of other nodes each sends by itself
        bandwidth, sent = device.network_bandwidth, volume * (ranks - share) / ranks
    hops = 2 * log2(ranks) if op == "all-reduce" else ranks - 1  # up and down a tree; others: a ring
    latency = assumed.message_seconds * (0.1 if inside else 1.0) + hops * assumed.hop_seconds
    seconds = sent / (bandwidth * assumed.link_efficiency) + latency
    return seconds, "inside a node" if inside else "between nodes"
