"""Every collective of one optimizer update, by arithmetic: what DeepSpeed, Megatron-Core's layers and fold send.

`benchmarks/collectives.py` counts what live engines send, at up to 1,024 ranks, and compares.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from math import ceil
from typing import Literal

from launch.config import RunConfig
from launch.planner.exchange import PARTITION_ALIGNMENT
from launch.planner.memory import Layout, element_bytes, portions_of, stream_bytes, whole_update
from launch.planner.pipeline import Portion, copied_elements, owned_elements, stage_elements, stored_elements
from launch.planner.rules import rules_under, settings_of
from model.config import ModelConfig
from model.loss import chunk_tokens
from model.sizes import parameter_specs, planned_blocks
from trainer.config import STAGE_3
from trainer.engines.buckets import bucket_indexes

Op = Literal["all-reduce", "all-gather", "reduce-scatter", "all-to-all", "send", "broadcast"]
WEIGHT_GATHER = "gather of updated weights"
EXPERT_GATHER, EXPERT_SCATTER = "gather of updated experts", "scatter of experts' gradients"
HEADS = "tokens for heads, and back"
KEYS = ("keys, values: first half", "keys, values: second half")
KEY_GRADIENTS = ("their gradients: first half", "their gradients: second half")
EXCHANGES = (HEADS, *KEYS, *KEY_GRADIENTS)
"""What context-parallel ranks exchange for attention."""
LATE = (KEYS[1], KEY_GRADIENTS[1])
"""What travels while a rank's early chunk attends."""
TO_EXPERTS = "copies of tokens to experts, and their gradients back"
FROM_EXPERTS = "results of experts, and their gradients there"
WEIGHTS_OF_COPIES = "weights of copies, counts"
EXPERT_EXCHANGES = (TO_EXPERTS, FROM_EXPERTS, WEIGHTS_OF_COPIES)
"""What ranks exchange that split experts, in every layer with experts."""
STREAMS = ("streams to the next stages", "their gradients back")
"""What pipeline-parallel ranks send each other in every micro-batch."""
LOADS = "loads of experts"
SCALAR_SUMS = "norms, counts, losses"
BF16_OPTIMIZER_BUCKET = 500_000_000
"""Elements of one message of DeepSpeed's BF16_Optimizer (stage 1, several micro-batches), whatever the bucket size."""


@dataclass(frozen=True)
class Message:
    """All collectives of one kind in an update."""

    what: str
    op: Op
    group: str
    """data, tensor, context, pipeline, replicas (data x context: the ranks with the same weights; named after the one of the
    two that has ranks, where only one has), stage (all with the same layers), ends (the first and the last of more than two
    ranks of a pipeline), hpZ, world, experts (which split them), expert replicas (which have the same), or copies
    (groups of ranks that hold the same part of the optimizer states)."""
    ranks: int
    bytes: float
    """Of the full tensors, all messages together: what is summed, or the output of a gather, or the input of a scatter, or
    what a rank divides among all in an all-to-all; of "send" and "broadcast" what all ranks send together."""
    messages: int
    """Of one rank; of "send" those of the rank that sends most, or of one that was asked for."""
    hidden: bool = False
    """It overlaps computation; "send" that of the optimizer, another that of forward and backward."""
    most_sent: float = 0.0
    """Of "send" and "broadcast": bytes of the same rank."""

    @property
    def bytes_sent(self) -> float:
        """Bytes that one rank sends, in a ring; of "send" and "broadcast" `most_sent`."""
        if self.op in ("send", "broadcast"):
            return self.most_sent
        return (2.0 if self.op == "all-reduce" else 1.0) * self.bytes * (self.ranks - 1) / self.ranks


def update_messages(
    config: RunConfig, layout: Layout, device: str = "cuda", rank: int = 0, sender: int | None = None
) -> list[Message]:
    """Every kind of collective of an update; groups of one rank are left out.

    Args:
        device: "cuda", or "cpu", which computes the loss in smaller chunks.
        rank: place in the pipeline of the rank that takes part.
        sender: of "send" what this one of the ranks at that place sends; None: that which sends most.
    """
    messages = [*scalar_messages(config, layout, rank)]
    if layout.tensor_parallel_size > 1:
        messages += tensor_parallel_messages(config, layout, device, rank)
    if layout.context_parallel_size > 1:
        messages += context_messages(config, layout, rank)
    if layout.expert_parallel_size > 1:
        messages += expert_messages(config, layout, rank)
    if config.model.layers_with_experts:
        messages += load_messages(config, layout, rank)
    if layout.pipeline_parallel_size > 1:
        messages += pipeline_messages(config, layout, None if sender is None else rank)
    if layout.replicas > 1:
        messages += data_parallel_messages(config, layout, rank)
    messages += whole_matrix_messages(config, layout, rank, sender)
    return [message for message in messages if message.messages and message.ranks > 1]


def scalar_messages(config: RunConfig, layout: Layout, rank: int = 0) -> Iterator[Message]:
    """Sums of a few numbers, which cost latency only: counts of targets, losses, largest logits, then norms."""
    optimizer, model, same, ranks = config.optimizer, config.model, layout.replica_group, layout.replicas
    stage, portion = layout.zero_stage if layout.engine == "zero" else 0, portions_of(config, layout)[rank]
    if same == "data":
        yield Message(SCALAR_SUMS, "all-reduce", "data", ranks, 2 * 4, 2)
    else:  # context-parallel ranks count the same targets
        yield Message(SCALAR_SUMS, "all-reduce", "data", layout.data_parallel_size, 4, 1)
        yield Message(SCALAR_SUMS, "all-reduce", same, ranks, 4, 1)
    yield Message(SCALAR_SUMS, "all-reduce", "pipeline", layout.pipeline_parallel_size, 4, 1)  # the losses, which the last has
    if portion.first and any(rows == "seen" for rows in _rows_of_rules(config)):
        yield Message(SCALAR_SUMS, "all-reduce", same, ranks, model.vocab_size + model.vocabulary_padding, 1)
    if optimizer.qk_clip is not None:
        heads = len(portion.layers) * model.num_attention_heads
        yield Message(SCALAR_SUMS, "all-reduce", "tensor", layout.tensor_parallel_size, 8 * heads, 1)
        yield Message(SCALAR_SUMS, "all-reduce", same, ranks, 8 * heads, 1)
    norms = _measured_norms(model, settings_of(config))
    group = same if layout.tensor_parallel_size == 1 else "tensor" if ranks == 1 else "world"
    group = "world" if layout.pipeline_parallel_size > 1 else group
    yield Message(SCALAR_SUMS, "all-reduce", group, layout.gpus, 8 * (1 + norms), 1)
    if stage == 3:  # a norm that DeepSpeed computes and tiglon does not use
        yield Message(SCALAR_SUMS, "all-reduce", same, ranks, 8, 1)
    if stage == 3 or (stage == 1 and _accumulates_in_float32(config, layout)):
        yield Message(SCALAR_SUMS, "all-reduce", "tensor", layout.tensor_parallel_size, 8 if stage == 3 else 4, 1)


def _rows_of_rules(config: RunConfig) -> set[str]:
    """AssignedRule.rows of all tensors."""
    return _rows_under(config.model, settings_of(config))


@lru_cache(maxsize=16)
def _rows_under(model: ModelConfig, settings: str) -> set[str]:
    return {choice.rows for choice in rules_under(model, settings).values()}


@lru_cache(maxsize=16)
def _measured_norms(model: ModelConfig, settings: str) -> int:
    """Of tensors and rows that rules measure, such as the RMS that Tiger's step size needs."""
    norms = 0
    for spec, choice in zip(parameter_specs(model).values(), rules_under(model, settings).values(), strict=True):
        measured = (choice.rule.relative_to(spec.kind), *choice.rule.measures(spec.kind))
        norms += sum(spec.rows if statistic.over == "row" else 1 for statistic in measured if statistic)
    return norms


def expert_messages(config: RunConfig, layout: Layout, rank: int = 0) -> list[Message]:
    """What ranks that split experts exchange, if the loads are even: in the forward of a layer how many copies go where, the
    copies and their weights, and the results back; in the backward the gradients of all of these but the first the other way.
    Full and selective recomputation repeat the forward's but for the results, which no gradient needs; that of experts begins
    where the copies have come.

    The copies travel beside the products of shared experts, the results beside nothing.
    """
    model, ranks, itemsize = config.model, layout.expert_parallel_size, element_bytes(config)
    layers = len({*portions_of(config, layout)[rank].layers} & {*model.layers_with_experts})
    repeated = layout.recompute in ("selective", "full")
    times, tokens = layers * layout.micro_batches, layout.tokens(config.train.sequence_length)
    copies, forwards = times * tokens * model.num_experts_per_tok, 1 + repeated
    there, moved = forwards + 1, copies * model.hidden_size * itemsize
    weighed, counted = there * copies * 4, forwards * times
    return [
        Message(TO_EXPERTS, "all-to-all", "experts", ranks, there * moved, there * times),
        Message(FROM_EXPERTS, "all-to-all", "experts", ranks, 2 * moved, 2 * times),
        Message(
            WEIGHTS_OF_COPIES, "all-to-all", "experts", ranks, weighed + 8 * counted * model.n_routed_experts,
            there * times + counted,
        ),
    ]  # fmt: skip


def load_messages(config: RunConfig, layout: Layout, rank: int = 0) -> Iterator[Message]:
    """Loads of all experts, which move the biases of the choice: once per update; with an auxiliary loss context-parallel ranks
    sum those of their sequences in every layer."""
    model, same, itemsize = config.model, layout.replica_group, 4
    size = itemsize * len(model.layers_with_experts) * model.n_routed_experts
    yield Message(LOADS, "all-reduce", same, layout.replicas, size, 1)
    yield Message(LOADS, "all-reduce", "pipeline", layout.pipeline_parallel_size, size, 1)
    if model.router_aux_loss_coef:
        own = [layer for layer in portions_of(config, layout)[rank].layers if layer in model.layers_with_experts]
        times = len(own) * layout.micro_batches * (1 + (layout.recompute in ("selective", "full")))
        loads = itemsize * layout.micro_batch_size * model.n_routed_experts
        yield Message(LOADS, "all-reduce", "context", layout.context_parallel_size, times * loads, times)


def tensor_parallel_messages(config: RunConfig, layout: Layout, device: str, rank: int = 0) -> list[Message]:
    """Collectives over tensor-parallel ranks: each waits for one matrix product, and the next product waits for it."""
    model, size, times = config.model, layout.tensor_parallel_size, layout.micro_batches
    portion = portions_of(config, layout)[rank]
    tokens, itemsize = layout.tokens(config.train.sequence_length), element_bytes(config)
    blocks, width = planned_blocks(model, portion.layers, size), model.hidden_size
    layers, needed = len(blocks), sum(block.needed_outputs for block in blocks)
    recomputed = layout.recompute in ("selective", "full")
    whole = [elements for block in blocks for sublayer in block.sublayers for elements in sublayer.whole_inputs()]
    # The inputs of a block and of the head are whole on every rank (their gradients are summed); the outputs of attention and
    # mlp are summed. A recomputed block sums only the outputs that its backward needs.
    inputs, outputs = tokens * itemsize * (sum(whole) + width * portion.last), tokens * itemsize * 2 * width * layers
    counts = (len(whole) + portion.last, 2 * layers)
    inputs_recomputed, outputs_recomputed = (tokens * itemsize * each * recomputed for each in (sum(whole), needed * width))
    counts_recomputed = (len(whole) * recomputed, needed * recomputed)
    totals: dict[Op, tuple[float, int]] = {"all-reduce": (0.0, 0), "all-gather": (0.0, 0), "reduce-scatter": (0.0, 0)}

    def add(op: Op, volume: float, messages: int) -> None:
        totals[op] = (totals[op][0] + volume * times, totals[op][1] + messages * times)

    if portion.first:
        add("all-reduce", tokens * itemsize * width, 1)  # the embedding
    if layout.sequence_parallel:
        add("all-gather", inputs + inputs_recomputed + outputs, sum(counts) + counts_recomputed[0])
        add("reduce-scatter", inputs + outputs + outputs_recomputed, sum(counts) + counts_recomputed[1])
        if portion.first:
            add("all-gather", tokens * itemsize * width, 1)  # the embedding's gradient
    else:
        add("all-reduce", inputs + outputs + outputs_recomputed, sum(counts) + counts_recomputed[1])
    replicated = _locally_used(model, size, layout.sequence_parallel, portion)
    add("all-reduce", itemsize * sum(replicated), len(replicated))  # gradients of weights that every rank has whole
    scalars = sum(sublayer.summed_scalars() for block in blocks for sublayer in block.sublayers) * (2 + recomputed)
    add("all-reduce", 4 * tokens * scalars, scalars)  # forward and backward
    if portion.last:
        chunks = ceil(tokens / chunk_tokens(device, (model.vocab_size + model.vocabulary_padding) // size, tokens))
        add("all-reduce", 3 * 4 * tokens, 2 * chunks)  # the loss: of each token the maximum logit, then two sums
    return [
        Message(f"tensor-parallel {ACTIVATIONS[op]}", op, "tensor", size, volume, messages)
        for op, (volume, messages) in totals.items()
    ]


def context_messages(config: RunConfig, layout: Layout, rank: int = 0) -> list[Message]:
    """What attention exchanges between context-parallel ranks, in every layer.

    Gathered keys and values travel in two messages, of the first half of the sequences and of the second, which arrives while
    the early chunk attends; so do their gradients. Heads are exchanged for tokens in one message, and results in another.
    Recomputation repeats what the forward sent.
    """
    ranks, itemsize = layout.context_parallel_size, element_bytes(config)
    own_layers = portions_of(config, layout)[rank].layers
    layers = [block.self_attn for block in planned_blocks(config.model, own_layers, layout.tensor_parallel_size)]
    forwards = 1 + (layout.recompute in ("selective", "full"))
    count, own = len(layers) * layout.micro_batches, layout.tokens(config.train.sequence_length) * layout.micro_batches
    if layout.context_exchange == "heads":
        bytes_once = itemsize * own * sum(sum(layer.exchanged_elements(ranks)) for layer in layers)
        times = forwards + 1
        return [Message(HEADS, "all-to-all", "context", ranks, times * bytes_once, 2 * times * count)]
    passes: tuple[tuple[Op, int, tuple[str, str]], ...] = (("all-gather", forwards, KEYS), ("reduce-scatter", 1, KEY_GRADIENTS))
    half = itemsize * own * ranks / 2 * sum(layer.gathered_elements() for layer in layers)
    return [
        Message(what, op, "context", ranks, times * half, times * count, what in LATE)
        for op, times, names in passes
        for what in names
    ]


def pipeline_messages(config: RunConfig, layout: Layout, rank: int | None = None) -> Iterator[Message]:
    """Residual streams and their gradients from stage to stage; and what a tied embedding costs the two ranks that have it.

    Args:
        rank: whose messages are counted, by its place; None: of each kind those of the rank that sends most.
    """
    ranks, stages, count = layout.pipeline_parallel_size, layout.pipeline_stages_per_rank, layout.micro_batches
    stream, last = stream_bytes(config, layout), ranks - 1
    for what, end in zip(STREAMS, (last, 0), strict=True):  # one rank has nothing behind, or before, one of its stages
        sent = count * (stages - (rank == end))
        yield Message(what, "send", "pipeline", ranks, stream * count * (ranks * stages - 1), sent, False, stream * sent)
    copied = copied_elements(config.model, layout.tensor_parallel_size, portions_of(config, layout)[-1])
    if copied and rank in (None, 0, last):
        gradient, weight = 4 * copied, element_bytes(config) * copied
        ends = "ends" if ranks > 2 else "pipeline"
        sent = rank != 0
        yield Message("gradient of the tied head", "send", ends, 2, gradient, int(sent), False, gradient * sent)
        sent = rank != last
        yield Message("updated embedding to the head", "broadcast", ends, 2, weight, 1, False, weight * sent)


def whole_matrix_messages(config: RunConfig, layout: Layout, rank: int = 0, sender: int | None = None) -> Iterator[Message]:
    """Parts of matrices that rules need whole, among the ranks with the same layers.

    Args:
        sender: whose messages are counted, of these ranks; None: of each kind those of the rank that sends most.
    """
    if (update := whole_update(config, layout, rank)) is None:
        return
    group = "stage" if layout.pipeline_parallel_size > 1 else "world"
    for what, sent in (("parts of matrices to their owners", update.to_owners), ("directions back", update.back)):
        counted = sent.busiest if sender is None else sender
        yield Message(
            what, "send", group, layout.stage_ranks, sum(sent.bytes_by_rank), sent.messages_by_rank[counted], True,
            sent.bytes_by_rank[counted],
        )  # fmt: skip


ACTIVATIONS: dict[Op, str] = {
    "all-reduce": "sums of activations", "all-gather": "gathers of activations", "reduce-scatter": "scatters of activations",
}  # fmt: skip


def _locally_used(model: ModelConfig, size: int, sequence_parallel: bool, portion: Portion) -> list[int]:
    """Elements of each weight that every tensor-parallel rank has whole and applies to its own tokens or heads only."""
    return [elements for elements, local in _whole_weights(model, size, portion) if sequence_parallel or local]


@lru_cache(maxsize=1024)
def _whole_weights(model: ModelConfig, size: int, portion: Portion) -> list[tuple[int, bool]]:
    """Of each weight that every tensor-parallel rank has whole: elements, and ParameterSpec.serves_local_heads."""
    specs = parameter_specs(model, size)
    whole = (specs[name] for name in owned_elements(model, size, portion) if specs[name].split is None)
    return [(spec.elements, spec.serves_local_heads) for spec in whole]


def data_parallel_messages(config: RunConfig, layout: Layout, rank: int = 0) -> list[Message]:
    """Sums of gradients (zero) or of the momentum (fold) over the ranks with the same weights, and gathers of weights."""
    group, ranks = layout.replica_group, layout.replicas
    itemsize, bucket = element_bytes(config), config.parallel.reduce_bucket_elements
    portion = portions_of(config, layout)[rank]
    where = (config.model, layout.tensor_parallel_size, portion, layout.expert_parallel_size)
    if layout.engine == "fold":  # float32, whatever the momentum is kept in: trainer/engines/buckets.py says why
        return _momentum_sums(config, layout, owned_elements(*where))
    elements = [*stored_elements(*where)[0].values()]
    total = sum(elements)
    experts = _expert_sums(config, layout, [*stored_elements(*where)[1].values()])
    if layout.zero_stage == 3:
        return _stage_3(config, layout, elements)
    padded = _round_up(total, PARTITION_ALIGNMENT * ranks)
    gather = Message(WEIGHT_GATHER, "all-gather", group, ranks, itemsize * padded, 1)
    if layout.pipeline_parallel_size > 1:
        return [_float32_sum(config, layout, portion, padded), gather, *experts]
    # DeepSpeed all-reduces each bucket and keeps its own part, in stage 2 too: twice the bytes of a reduce-scatter.
    if layout.zero_stage == 1 and _accumulates_in_float32(config, layout):  # once per update, in bf16
        messages = len(_message_elements(elements, BF16_OPTIMIZER_BUCKET))
        return [Message("sum of gradients", "all-reduce", group, ranks, itemsize * padded, messages, False), gather, *experts]
    times = layout.micro_batches if layout.zero_stage == 2 else 1
    messages = _reduce_messages(elements, bucket, padded // ranks) * times
    return [Message("sum of gradients", "all-reduce", group, ranks, itemsize * total * times, messages, True), gather, *experts]


def _momentum_sums(config: RunConfig, layout: Layout, owned: dict[str, int]) -> list[Message]:
    """Of fold: over all ranks with the same weights, and of experts that ranks split over those with the same experts."""
    limit, specs = config.parallel.reduce_bucket_elements, parameter_specs(config.model)
    split = {name for name in owned if specs[name].part == "experts"} if layout.expert_parallel_size > 1 else set[str]()
    groups = [(layout.replica_group, layout.replicas, False), ("expert replicas", layout.expert_replicas, True)]
    sums = []
    for group, ranks, chosen in groups:
        sizes = [count for name, count in owned.items() if (name in split) is chosen][::-1]
        messages, what = len(bucket_indexes(sizes, limit)), "sum of experts' momentum" if chosen else "sum of the momentum"
        sums.append(Message(what, "all-reduce", group, ranks, 4 * sum(sizes), messages, True))
    return sums


def _expert_sums(config: RunConfig, layout: Layout, stacks: list[int]) -> list[Message]:
    """Gradients of experts that ranks split, over the ranks with the same experts: under ZeRO 1 float32 sums are scattered once
    per update, under ZeRO 2 those of every micro-batch averaged while the backward runs; and their updated weights."""
    ranks, limit = layout.expert_replicas, config.parallel.reduce_bucket_elements
    padded = _round_up(sum(stacks), PARTITION_ALIGNMENT * ranks)
    weights = Message(EXPERT_GATHER, "all-gather", "expert replicas", ranks, element_bytes(config) * padded, 1)
    if not stacks:
        return []
    if layout.zero_stage == 1:
        scatters = ceil(padded / limit)
        return [Message(EXPERT_SCATTER, "reduce-scatter", "expert replicas", ranks, 4 * padded, scatters), weights]
    messages = layout.micro_batches * len(bucket_indexes(stacks[::-1], limit))
    volume = 4 * sum(stacks) * layout.micro_batches
    return [Message("sum of experts' gradients", "all-reduce", "expert replicas", ranks, volume, messages, True), weights]


def _float32_sum(config: RunConfig, layout: Layout, portion: Portion, padded: int) -> Message:
    """Sum of a pipeline-parallel rank's gradients under ZeRO: stage 1 scatters the sums of all micro-batches at the end of an
    update, stage 2 sums those of every micro-batch while the backward runs.

    Args:
        padded: elements of the rank, a multiple of the ranks that share them.
    """
    group, ranks, limit = layout.replica_group, layout.replicas, config.parallel.reduce_bucket_elements
    if layout.zero_stage == 1:
        return Message("scatter of gradients", "reduce-scatter", group, ranks, 4 * padded, ceil(padded / limit))
    times = layout.micro_batches
    stages = stage_elements(config.model, layout.tensor_parallel_size, portion, True, layout.expert_parallel_size)
    messages = times * sum(len(bucket_indexes(stage[::-1], limit)) for stage in stages)
    return Message("sum of gradients", "all-reduce", group, ranks, 4 * times * sum(map(sum, stages)), messages, True)


def _stage_3(config: RunConfig, layout: Layout, elements: list[int]) -> list[Message]:
    """ZeRO-3: every tensor is partitioned by itself, padded to a multiple of the ranks."""
    group, ranks, hpz = layout.replica_group, layout.replicas, layout.zero_hpz_partition_size
    itemsize, times = element_bytes(config), layout.micro_batches
    padded = [itemsize * _round_up(each, ranks) for each in elements]
    persistent = [each <= STAGE_3["stage3_param_persistence_threshold"] for each in elements]
    gathers = _gathers_per_micro_batch(config, layout, elements)
    partitioned = [each for each, stay in zip(elements, persistent, strict=True) if not stay]
    once = sum(volume for volume, stay in zip(padded, persistent, strict=True) if not stay)
    every = sum(volume * count for volume, stay, count in zip(padded, persistent, gathers, strict=True) if not stay)
    # A message is about a prefetch bucket; its exact size varies with prefetching (counted: 0 to 20 % more messages).
    messages = len(_message_elements(partitioned, STAGE_3["stage3_prefetch_bucket_size"]))
    all_messages = ceil(messages * every / once) if once else 0
    # with hpZ the first forward gathers from all ranks and leaves a copy inside the node for the later passes
    far, near = (once, times * every - once) if hpz > 1 else (times * every, 0)
    far_messages = messages if hpz > 1 else times * all_messages
    found = [Message("gather of weights", "all-gather", group, ranks, far, far_messages, True)]
    found.append(
        Message("gather of weights from hpZ's copy", "all-gather", "hpZ", hpz, near, times * all_messages - far_messages, True)
    )
    kept = sum(volume for volume, stay in zip(padded, persistent, strict=True) if stay)
    found.append(Message("gather of small updated weights", "all-gather", group, ranks, kept, sum(persistent)))
    buckets = len(bucket_indexes(elements[::-1], config.parallel.reduce_bucket_elements))
    found.append(Message("scatter of gradients", "reduce-scatter", group, ranks, times * sum(padded), times * buckets, True))
    return found


def _gathers_per_micro_batch(config: RunConfig, layout: Layout, elements: list[int]) -> list[int]:
    """How often a micro-batch gathers each tensor under ZeRO-3.

    A tensor is gathered again for the backward if more elements of other weights than DeepSpeed's reuse distance are used
    between its two uses, unless prefetching, which runs ahead by at most stage3_max_live_parameters, has reached its second
    use by then.
    """
    reuse, most = STAGE_3["stage3_max_reuse_distance"], STAGE_3["stage3_max_live_parameters"]
    order = list(range(len(elements)))
    names = stored_elements(config.model, layout.tensor_parallel_size, portions_of(config, layout)[0])[0]
    block_of = [name.split(".")[2] if name.startswith("model.layers.") else "" for name in names]
    blocks = [[*members] for block, members in groupby(order, block_of.__getitem__) if block]
    last = order[blocks[-1][-1] + 1 :] + ([0] if config.model.tie_word_embeddings else [])
    forward = [*order[: blocks[-1][-1] + 1], *last]
    backward: list[int] = last[::-1]
    for block in blocks[::-1]:
        backward += (block if layout.recompute in ("selective", "full") else []) + block[::-1]
    forward_elements = sum(elements[index] for index in forward)
    last_use: dict[int, int] = {}  # in elements used before
    counts, used = [0] * len(elements), 0
    for index in [*forward, *backward, 0]:
        prefetched = (
            index in last_use
            and last_use[index] <= forward_elements
            and forward_elements - last_use[index] + elements[index] <= most
        )
        if index not in last_use or (used - last_use[index] >= reuse and not prefetched):
            counts[index] += 1
        used += elements[index]
        last_use[index] = used
    return counts


def _reduce_messages(elements: Sequence[int], limit: int, part: int) -> int:
    """Messages of DeepSpeed's stages 1 and 2.

    A bucket is one message. A tensor larger than the bucket is cut at the borders of the ranks' partitions of the flat
    weights, and sent in runs of slices that are just above the limit.

    Args:
        limit: elements of a bucket.
        part: elements of a rank's partition.
    """
    ends, total = [], 0
    for each in elements:
        total += each
        ends.append(total)
    messages = 0
    for members in bucket_indexes(elements[::-1], limit):
        bucket = sum(elements[len(elements) - 1 - index] for index in members)
        if bucket <= limit:
            messages += 1
            continue
        end = ends[len(elements) - 1 - members[0]]
        start, filled = end - bucket, 0
        while start < end:
            stop = min(end, (start // part + 1) * part)
            filled, start = filled + stop - start, stop
            if filled > limit or start == end:
                messages, filled = messages + 1, 0
    return messages


def _message_elements(elements: Sequence[int], limit: int) -> list[int]:
    """Elements of each message, where one is sent as soon as it exceeds the limit."""
    found, filled = [], 0
    for each in elements:
        filled += each
        if filled > limit:
            found.append(filled)
            filled = 0
    return [*found, filled] if filled else found


def _round_up(elements: int, multiple: int) -> int:
    return ceil(elements / multiple) * multiple


def _accumulates_in_float32(config: RunConfig, layout: Layout) -> bool:
    """Whether DeepSpeed takes its BF16_Optimizer in stage 1, which sums micro-batches in float32 and sends bf16."""
    several = layout.micro_batches > 1 and layout.pipeline_parallel_size == 1
    return element_bytes(config) == 2 and several and layout.offload == "none"
