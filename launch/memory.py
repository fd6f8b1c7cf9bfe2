"""Bytes one rank holds, by kind, for any layout: arithmetic on the configuration, no hardware.

`benchmarks/plan_check.py` holds these numbers against the live engines.
"""

from dataclasses import asdict, dataclass, replace
from typing import Literal

from launch.config import RunConfig
from model.flops import Tensor, activations, kinds, sizes
from trainer.buckets import IN_FLIGHT, cut
from trainer.config import STAGE_3


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
    """Micro-batches an update, on each rank."""
    recompute: str
    zero_hpz_partition_size: int = 1
    """ZeRO-3: data-parallel ranks that hold one more copy of the weights; 1 = none."""

    @property
    def gpus(self) -> int:
        """Ranks in all."""
        return self.data_parallel_size * self.tensor_parallel_size

    @property
    def name(self) -> str:
        """Engine, then tensor-parallel x data-parallel ranks: "ZeRO-1 2x4"."""
        engine = "fold" if self.engine == "fold" else f"ZeRO-{self.zero_stage}"
        more = ("+hpZ" if self.zero_hpz_partition_size > 1 else "") + ("+offload" if self.offload == "cpu" else "")
        return f"{engine}{more} {self.tensor_parallel_size}x{self.data_parallel_size}"


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank by kind; `peak` is the most that is there at once."""

    weights: int
    masters: int
    states: int
    gradients: int
    """When the last backward has ended and the update has not begun."""
    activations: int = 0
    logits: int = 0
    buffers: int = 0
    host: int = 0
    """In the host's memory (offload); not part of the peak."""
    peak: int = 0

    @property
    def training_state(self) -> int:
        """Weights, masters, optimizer states and gradients."""
        return self.weights + self.masters + self.states + self.gradients

    def as_dict(self) -> dict[str, int]:
        """By kind, with the training state."""
        return asdict(self) | {"training_state": self.training_state}


def layout_of(config: RunConfig, gpus: int) -> Layout:
    """The layout the configuration asks for on `gpus` ranks.

    Raises:
        ValueError: the ranks or the batch do not divide.
    """
    train, parallel = config.train, config.parallel
    tensor, size = parallel.tensor_parallel_size, train.micro_batch_size
    if gpus < 1 or gpus % tensor:
        raise ValueError(f"{gpus} ranks cannot form groups of parallel.tensor_parallel_size = {tensor}; use a multiple of it")
    data = gpus // tensor
    if train.global_batch_size % (data * size):
        raise ValueError(
            f"train.global_batch_size = {train.global_batch_size} is not a multiple of {data} data-parallel ranks x "
            f"micro_batch_size {size} = {data * size}; change one of them"
        )
    return Layout(
        data, tensor, parallel.sequence_parallel, parallel.engine, parallel.zero_stage, parallel.offload,
        size, train.global_batch_size // (data * size), train.recompute,
    )  # fmt: skip


def memory(config: RunConfig, layout: Layout, device: str = "cuda") -> Memory:
    """Bytes of one rank on a "cuda" or "cpu" device.

    The peak is the largest of four moments: in the loss of the last micro-batch, while a block is formed again, at the
    end of the backward, and in the update.
    """
    held, low = state(config, layout), low_bytes(config)
    tokens = layout.micro_batch_size * config.train.sequence_length
    window = config.position.window
    made = activations(
        config.model, tokens, config.train.sequence_length, low,
        layout.tensor_parallel_size, layout.sequence_parallel, layout.recompute, device, config.train.compile,
        regions=1 if window is None or window >= config.train.sequence_length else 2,
    )  # fmt: skip
    gradients, update = _moments(config, layout, held)
    buffers = _buffers(config, layout)
    late = buffers if layout.engine == "fold" else 0  # its buckets are filled by the last backward, behind the loss
    lasting = held.weights + held.masters + held.states + buffers - late
    carried = gradients.carried + made.kept + max(made.loss, made.remade + late)
    peak = lasting + max(carried, gradients.end + late, held.gradients + update)
    return replace(held, activations=made.kept + made.remade, logits=made.loss, buffers=buffers, peak=peak)


def state(config: RunConfig, layout: Layout) -> Memory:
    """Weights, masters, optimizer states and gradients of one rank; nothing else is filled in.

    Raises:
        ValueError: a ZeRO stage other than 1, 2, 3.
    """
    numbers, states, _ = _numbers(config, layout)
    low, share = low_bytes(config), layout.data_parallel_size
    if layout.engine == "fold":
        return Memory(low * numbers, 0, low * states, 0)
    if layout.zero_stage not in (1, 2, 3):
        raise ValueError(f"zero_stage = {layout.zero_stage} must be 1, 2 or 3")
    weights = low * numbers // (share if layout.zero_stage == 3 else 1)
    if layout.zero_hpz_partition_size > 1:
        weights += low * numbers // layout.zero_hpz_partition_size
    wide_sum = low == 2 and layout.micro_batches > 1
    if wide_sum and layout.zero_stage == 1 and layout.offload == "none":
        # DeepSpeed's BF16_Optimizer: an unsplit float32 sum, and the bf16 gradients beside it
        gradients = (4 + low) * numbers
    else:
        gradients = (4 if wide_sum else low) * numbers // share
    if layout.offload == "cpu":
        return Memory(weights, 0, 0, gradients, host=(2 * 4 * numbers + 4 * states) // share)
    return Memory(weights, 4 * numbers // share, 4 * states // share, gradients)


@dataclass(frozen=True)
class _Gradients:
    carried: int
    """There already when the last micro-batch begins."""
    end: int
    """At the end of its backward, before partitions are all that is left."""


def _moments(config: RunConfig, layout: Layout, held: Memory) -> tuple[_Gradients, int]:
    """(gradients over time, bytes the update adds)."""
    numbers, _, largest = _numbers(config, layout)
    low = low_bytes(config)
    if layout.engine == "fold":
        return _Gradients(low * largest, low * largest), 0
    several = layout.micro_batches > 1
    update = 8 * numbers // layout.data_parallel_size if layout.offload == "none" else 0
    if layout.zero_stage == 1 and held.gradients < (4 + low) * numbers:
        return _Gradients(low * numbers if several else 0, low * numbers), update
    if layout.zero_stage == 1:
        return _Gradients(held.gradients, held.gradients), 0
    return _Gradients(held.gradients if several else 0, held.gradients), update


def checkpoint_bytes(config: RunConfig) -> int:
    """Bytes of a checkpoint: weights (float32 masters under zero) and optimizer states, whatever the layout."""
    whole = Layout(1, 1, False, config.parallel.engine, 1, "none", 1, 1, "none")
    numbers, states, _ = _numbers(config, whole)
    return (low_bytes(config) if config.parallel.engine == "fold" else 4) * (numbers + states)


def _numbers(config: RunConfig, layout: Layout) -> tuple[int, int, int]:
    """(parameters, numbers of optimizer state, numbers of the largest parameter) of a tensor-parallel rank."""
    mine = [(tensor, count, tensor.numbers_per_rank(layout.tensor_parallel_size)) for tensor, count in kinds(config.model)]
    numbers = sum(count * each for _, count, each in mine)
    states = sum(count * each * moments(config, tensor) for tensor, count, each in mine)
    return numbers, states, max(each for _, _, each in mine)


def moments(config: RunConfig, tensor: Tensor) -> int:
    """Numbers an optimizer keeps for each of a parameter's."""
    optimizer = config.optimizer
    return 2 if optimizer.name == "adamw" or (optimizer.embedding == "adamw" and tensor.part == "embedding") else 1


def low_bytes(config: RunConfig) -> int:
    """Bytes of an element of the network, as it is computed."""
    return 4 if config.train.precision == "fp32" else 2


def _buffers(config: RunConfig, layout: Layout) -> int:
    """Buckets of the collectives, and the weights ZeRO-3 has gathered."""
    numbers, _, largest = _numbers(config, layout)
    low, bucket = low_bytes(config), min(config.parallel.reduce_bucket_numbers, numbers)
    if layout.data_parallel_size == 1:
        return 0
    if layout.engine == "fold":
        return 4 * _in_flight(sizes(config.model, layout.tensor_parallel_size)[::-1], config.parallel.reduce_bucket_numbers)
    if layout.zero_stage == 1:
        return low * bucket
    if layout.zero_stage == 2:
        return 2 * low * bucket
    return low * (bucket + min(numbers, max(STAGE_3["stage3_max_live_parameters"], largest)))


def _in_flight(backwards: list[int], limit: int) -> int:
    """Most numbers that fold's buckets hold at once: some that follow one another."""
    filled = [sum(backwards[index] for index in members) for members in cut(backwards, limit)]
    return max(sum(filled[start : start + IN_FLIGHT]) for start in range(len(filled)))
