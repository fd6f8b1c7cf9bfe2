"""Which batches a run reads, in which sizes, and how each divides among its ranks."""

from data.corpus.batches import BatchSizes, Ramp
from launch.config import RunConfig
from model.parallel.mesh import AXES, rank_grid
from trainer.config import TrainConfig
from trainer.monitoring.progress import plural
from trainer.state import State

BEGINNING = State()


def batch_sizes(train: TrainConfig) -> BatchSizes:
    """Sequences of every batch."""
    return BatchSizes(train.global_batch_size, tuple(train.batch_ramp))


def row_lengths(train: TrainConfig) -> Ramp:
    """Target tokens per row of every batch."""
    return Ramp(train.sequence_length, tuple(train.length_ramp))


def total_batches(train: TrainConfig, begun: State = BEGINNING) -> int:
    """Batches that the whole run reads, with those that rewinds left behind, if none is left behind from here on.

    Args:
        begun: what the run has reached, as in the next two functions.
    """
    return begun.batch + max(0, train.steps - begun.step)


def total_tokens(train: TrainConfig, begun: State = BEGINNING) -> int:
    """Target tokens that the whole run trains on, without those of batches that rewinds left behind."""
    sizes = batch_sizes(train)
    left = sizes.before(total_batches(train, begun)) - sizes.before(begun.batch)
    return begun.tokens + left * train.sequence_length


def ahead(config: RunConfig, begun: State = BEGINNING) -> RunConfig:
    """The configuration with the updates that remain, and the sizes of their batches, which are counted from 0.

    For what has to do with the batches to come alone: how they divide over the ranks, and what they cost.
    """
    train, ramp = config.train, batch_sizes(config.train).from_batch(begun.batch).ramp
    left = {"steps": max(0, train.steps - begun.step), "batch_ramp": [*ramp]}
    return config.model_copy(update={"train": train.model_copy(update=left)})


def micro_batches(config: RunConfig, world_size: int) -> int:
    """Micro-batches per update on each rank, of the largest updates. Of a run that resumes, hand in what is `ahead`.

    Raises:
        ValueError: the world fits no layout.
    """
    train, parallel = config.train, config.parallel
    if world_size < 1:
        raise ValueError(f"a run has at least 1 rank, got {world_size}; give --nproc 1 or more")
    grid = rank_grid(world_size, parallel.tensor_parallel_size, parallel.context_parallel_size)
    ranks = grid.shape[AXES.index("data")]
    together = train.micro_batch_size * ranks
    for size in train.batch_sizes:
        if size % together:
            last = size == train.global_batch_size
            key = f"train.global_batch_size = {size}" if last else f"train.batch_ramp has {plural(size, 'sequence')}, which"
            raise ValueError(
                f"{key} is not a multiple of train.micro_batch_size = {train.micro_batch_size} times "
                f"{plural(ranks, 'data-parallel rank')}; change one of them"
            )
    return max(train.batch_sizes) // together
