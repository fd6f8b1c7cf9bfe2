"""Every collective of one optimizer update, by arithmetic: what DeepSpeed, Megatron's layout and fold send.

`benchmarks/collectives.py` counts what live engines send, at up to 1,024 ranks, and holds these numbers against it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Literal

from launch.config import RunConfig
from launch.memory import Layout, low_bytes
from model.config import ModelConfig
from model.flops import Tensor, sizes, tensors
from model.loss import chunk_tokens
from trainer.buckets import cut
from trainer.config import STAGE_3

Op = Literal["all-reduce", "all-gather", "reduce-scatter"]
UPDATED = "gather of updated weights"
SMALL = "norms, counts, losses"
UNSPLIT = 500_000_000
"""Numbers of one message of DeepSpeed's BF16_Optimizer (stage 1, several micro-batches), whatever the bucket."""
ALIGNED = 2
"""Numbers to a multiple of which DeepSpeed pads each rank's part of the flat weights in stages 1 and 2."""


@dataclass(frozen=True)
class Sent:
    """One kind of collective in an update, all of its messages together."""

    what: str
    op: Op
    group: str
    """data, tensor, hpZ, world, or copies (of optimizer states that a part of the ranks share)."""
    ranks: int
    bytes: float
    """Of the whole tensors: what every rank has of a sum, all of what is gathered or scattered."""
    messages: int
    hidden: bool = False
    """It travels behind computation."""

    @property
    def sent(self) -> float:
        """Bytes that a rank sends in a ring."""
        return (2.0 if self.op == "all-reduce" else 1.0) * self.bytes * (self.ranks - 1) / self.ranks


def sent(config: RunConfig, layout: Layout, device: str = "cuda") -> list[Sent]:
    """What a rank sends in an update; nothing where a group has one rank.

    Args:
        device: "cuda" or "cpu", which takes the loss in smaller chunks.
    """
    found = [*small(config, layout)]
    if layout.tensor_parallel_size > 1:
        found += tensor_parallel(config, layout, device)
    if layout.data_parallel_size > 1:
        found += data_parallel(config, layout)
    return [part for part in found if part.messages and part.ranks > 1]


def small(config: RunConfig, layout: Layout) -> Iterator[Sent]:
    """Sums of a few numbers, which take a message's start and no more: the targets and the losses, then the norms."""
    optimizer, model, data = config.optimizer, config.model, layout.data_parallel_size
    stage = layout.zero_stage if layout.engine == "zero" else 0
    yield Sent(SMALL, "all-reduce", "data", data, 2 * 4, 2)
    if optimizer.embedding == "lazy":
        yield Sent(SMALL, "all-reduce", "data", data, model.vocab_size, 1)
    sized = 0
    if optimizer.name == "tiger":
        sized = sum(len(tensor.shape) == 2 for tensor in tensors(model)) - (optimizer.embedding == "adamw")
        sized += model.vocab_size - 1 if optimizer.embedding_rms == "row" else 0
    everybody = "data" if layout.tensor_parallel_size == 1 else "world"
    yield Sent(SMALL, "all-reduce", everybody, layout.gpus, 8 * (1 + sized), 1)
    if stage == 3:  # DeepSpeed's own norms, which nobody reads
        yield Sent(SMALL, "all-reduce", "data", data, 8, 1)
    if stage == 3 or (stage == 1 and _summed_wide(config, layout)):
        yield Sent(SMALL, "all-reduce", "tensor", layout.tensor_parallel_size, 8 if stage == 3 else 4, 1)


def tensor_parallel(config: RunConfig, layout: Layout, device: str) -> list[Sent]:
    """Sums over tensor-parallel ranks, which wait for one matrix product and hold up the next."""
    model, size, times = config.model, layout.tensor_parallel_size, layout.micro_batches
    tokens, low = layout.micro_batch_size * config.train.sequence_length, low_bytes(config)
    layers, width, again = model.num_hidden_layers, model.hidden_size, layout.recompute in ("selective", "full")
    entered, shared = _entered(model, size)
    # A block's inputs, and that of the head, come whole to all ranks; its two results are summed. A block that is formed
    # again ends with the last product, whose result nobody wants twice: only the attention's is summed again.
    inputs, outputs = tokens * low * (sum(entered) * layers + width), tokens * low * 2 * width * layers
    counts = (len(entered) * layers + 1, 2 * layers)
    inputs_again, outputs_again = (tokens * low * layers * each * again for each in (sum(entered), width))
    counts_again = (len(entered) * layers * again, layers * again)
    rows: dict[Op, tuple[float, int]] = {"all-reduce": (0.0, 0), "all-gather": (0.0, 0), "reduce-scatter": (0.0, 0)}

    def add(op: Op, volume: float, messages: int) -> None:
        rows[op] = (rows[op][0] + volume * times, rows[op][1] + messages * times)

    add("all-reduce", tokens * low * width, 1)  # the embedding
    if layout.sequence_parallel:
        add("all-gather", inputs + inputs_again + outputs, sum(counts) + counts_again[0])
        add("reduce-scatter", inputs + outputs + outputs_again, sum(counts) + counts_again[1])
        add("all-gather", tokens * low * width, 1)  # the embedding's gradient
        shared = [*shared, width, width]
        add("all-reduce", low * width, 1)  # the last norm's gradient
        if model.tie_word_embeddings and model.tied_head == "projection":
            add("all-reduce", low * width * width, 1)
    else:
        add("all-reduce", inputs + outputs + outputs_again, sum(counts) + counts_again[1])
        shared = []
    if model.attention == "gqa" and model.qk_norm == "rms":
        shared = [*shared, model.head_size, model.head_size]
    add("all-reduce", low * sum(shared) * layers, len(shared) * layers)  # gradients of weights that every rank holds
    chunks = ceil(tokens / chunk_tokens(device, model.vocab_size // size, tokens))
    add("all-reduce", 3 * 4 * tokens, 2 * chunks)  # the loss: the largest logit, then two sums, of each token
    return [
        Sent(f"tensor-parallel {WORDS[op]}", op, "tensor", size, volume, messages) for op, (volume, messages) in rows.items()
    ]


WORDS: dict[Op, str] = {
    "all-reduce": "sums of activations", "all-gather": "gathers of activations", "reduce-scatter": "scatters of activations",
}  # fmt: skip


def _entered(model: ModelConfig, size: int) -> tuple[list[int], list[int]]:
    """Of one block: (widths of what comes whole to all ranks, numbers of weights that every rank holds whole but for norms)."""
    width = model.hidden_size
    if model.attention == "gqa":
        if model.kv_heads % size == 0:
            return [width, width], []
        keys = model.kv_heads * model.head_size  # more ranks than key heads: each has all keys, and gathers them made
        return [width, keys, keys, width], [keys * width, keys * width]
    latent, rotary, queries = model.kv_lora_rank or 0, model.qk_rope_head_dim or 0, model.q_lora_rank
    whole = [(latent + rotary) * width, latent]
    if queries is None:
        return [width, latent + rotary, width], whole
    return [queries, latent + rotary, width], [queries * width, queries, *whole]


def data_parallel(config: RunConfig, layout: Layout) -> list[Sent]:
    """Gradients, or the momentum, over data-parallel ranks, and the weights back."""
    ranks, low, bucket = layout.data_parallel_size, low_bytes(config), config.parallel.reduce_bucket_numbers
    mine = sizes(config.model, layout.tensor_parallel_size)
    backwards, numbers = mine[::-1], sum(mine)
    if layout.engine == "fold":  # float32, whatever the momentum is kept in: trainer/buckets.py says why
        return [Sent("sum of the momentum", "all-reduce", "data", ranks, 4 * numbers, len(cut(backwards, bucket)), True)]
    if layout.zero_stage == 3:
        return _stage_3(config, layout, mine)
    padded = _up(numbers, ALIGNED * ranks)
    back = Sent(UPDATED, "all-gather", "data", ranks, low * padded, 1)
    # DeepSpeed sums each bucket over all ranks and keeps its own part, in stage 2 too: twice what a scatter would send.
    if layout.zero_stage == 1 and _summed_wide(config, layout):  # once, and in bf16
        return [Sent("sum of gradients", "all-reduce", "data", ranks, low * padded, len(_filled(mine, UNSPLIT)), False), back]
    times = layout.micro_batches if layout.zero_stage == 2 else 1
    messages = _summed(mine, bucket, padded // ranks) * times
    return [Sent("sum of gradients", "all-reduce", "data", ranks, low * numbers * times, messages, True), back]


def _stage_3(config: RunConfig, layout: Layout, mine: list[int]) -> list[Sent]:
    """Every tensor is cut by itself, and padded to a multiple of the ranks."""
    ranks, low, times, hpz = layout.data_parallel_size, low_bytes(config), layout.micro_batches, layout.zero_hpz_partition_size
    whole = [low * _up(each, ranks) for each in mine]
    stays = [each <= STAGE_3["stage3_param_persistence_threshold"] for each in mine]
    gathers = _gathers(config, layout, mine)
    parted = [each for each, stay in zip(mine, stays, strict=True) if not stay]
    once = sum(volume for volume, stay in zip(whole, stays, strict=True) if not stay)
    every = sum(volume * count for volume, stay, count in zip(whole, stays, gathers, strict=True) if not stay)
    # Of about the prefetching's size; how many it really joins depends on how far ahead it is (counted: 0 to 20 % more).
    messages = len(_filled(parted, STAGE_3["stage3_prefetch_bucket_size"]))
    all_messages = ceil(messages * every / once) if once else 0
    # with hpZ the first forward gathers from all ranks and leaves a copy inside the node for the other passes
    far, near = (once, times * every - once) if hpz > 1 else (times * every, 0)
    far_messages = messages if hpz > 1 else times * all_messages
    found = [Sent("gather of weights", "all-gather", "data", ranks, far, far_messages, True)]
    found.append(
        Sent("gather of weights from hpZ's copy", "all-gather", "hpZ", hpz, near, times * all_messages - far_messages, True)
    )
    kept = sum(volume for volume, stay in zip(whole, stays, strict=True) if stay)
    found.append(Sent("gather of small updated weights", "all-gather", "data", ranks, kept, sum(stays)))
    buckets = len(cut(mine[::-1], config.parallel.reduce_bucket_numbers))
    found.append(Sent("scatter of gradients", "reduce-scatter", "data", ranks, times * sum(whole), times * buckets, True))
    return found


def _gathers(config: RunConfig, layout: Layout, mine: list[int]) -> list[int]:
    """How often a micro-batch gathers each tensor.

    Again for the backward where, between two uses, more numbers of other weights are used than DeepSpeed's reuse distance;
    but not what its prefetching, which runs ahead by as much as may be there at once, has met on its way back by then.
    """
    reuse, most = STAGE_3["stage3_max_reuse_distance"], STAGE_3["stage3_max_live_parameters"]
    order = list(range(len(mine)))
    layers = config.model.num_hidden_layers
    each = (len(mine) - len(_outside(config.model))) // layers
    blocks = [order[1 + layer * each : 1 + (layer + 1) * each] for layer in range(layers)]
    last = order[1 + layers * each :] + ([0] if config.model.tie_word_embeddings else [])
    forward = [0, *order[1 : 1 + layers * each], *last]
    backward: list[int] = last[::-1]
    for block in blocks[::-1]:
        backward += (block if layout.recompute in ("selective", "full") else []) + block[::-1]
    turn = sum(mine[index] for index in forward)
    seen: dict[int, int] = {}
    counts, travelled = [0] * len(mine), 0
    for index in [*forward, *backward, 0]:
        met = index in seen and seen[index] <= turn and turn - seen[index] + mine[index] <= most
        if index not in seen or (travelled - seen[index] >= reuse and not met):
            counts[index] += 1
        travelled += mine[index]
        seen[index] = travelled
    return counts


def _outside(model: ModelConfig) -> list[Tensor]:
    return [tensor for tensor in tensors(model) if ".layers." not in tensor.name]


def _summed(mine: Sequence[int], limit: int, part: int) -> int:
    """Messages of DeepSpeed's stages 1 and 2: a bucket is one; a tensor larger than that is cut where ranks' parts of the
    flat weights meet, and sent in runs of pieces that are just above the limit."""
    ends, total = [], 0
    for each in mine:
        total += each
        ends.append(total)
    messages = 0
    for members in cut(mine[::-1], limit):
        numbers = sum(mine[len(mine) - 1 - index] for index in members)
        if numbers <= limit:
            messages += 1
            continue
        end = ends[len(mine) - 1 - members[0]]
        start, filled = end - numbers, 0
        while start < end:
            stop = min(end, (start // part + 1) * part)
            filled, start = filled + stop - start, stop
            if filled > limit or start == end:
                messages, filled = messages + 1, 0
    return messages


def _filled(mine: Sequence[int], limit: int) -> list[int]:
    """Numbers of messages that are sent as soon as they have reached a limit."""
    found, filled = [], 0
    for each in mine:
        filled += each
        if filled > limit:
            found.append(filled)
            filled = 0
    return [*found, filled] if filled else found


def _up(numbers: int, multiple: int) -> int:
    return ceil(numbers / multiple) * multiple


def _summed_wide(config: RunConfig, layout: Layout) -> bool:
    """Whether micro-batches are summed in float32 by DeepSpeed's BF16_Optimizer, if in stage 1."""
    return low_bytes(config) == 2 and layout.micro_batches > 1 and layout.offload == "none"
