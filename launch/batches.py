"""Which batches a run reads, in which sizes, and how each divides among its ranks."""

import itertools

from torch import Tensor

from data.corpus.batches import BatchSizes, Ramp
from launch.config import RunConfig
from model.parallel.mesh import AXES, REPLICAS, expert_ranks, rank_grid, ranks_along
from trainer.config import ParallelConfig, TrainConfig
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


def grid_of(parallel: ParallelConfig, world_size: int) -> Tensor:
    """All ranks by their place on the axes (model/parallel/mesh.py, rank_grid).

    Raises:
        ValueError: the world fits no layout.
    """
    grid = rank_grid(
        world_size, parallel.tensor_parallel_size, parallel.context_parallel_size, parallel.pipeline_parallel_size
    )  # fmt: skip
    expert_ranks(ranks_along(REPLICAS, 0, grid), 0, parallel.expert_parallel_size)
    return grid


def micro_batches(config: RunConfig, world_size: int) -> int:
    """Micro-batches per update on each rank, of the largest updates. Of a run that resumes, hand in what is `ahead`.

    Raises:
        ValueError: the world fits no layout.
    """
    train = config.train
    if world_size < 1:
        raise ValueError(f"a run has at least 1 rank, got {world_size}; give --nproc 1 or more")
    ranks = grid_of(config.parallel, world_size).shape[AXES.index("data")]
    together = train.micro_batch_size * ranks
    for size in train.batch_sizes:
        if size % together:
            last = size == train.global_batch_size
            key = f"train.global_batch_size = {size}" if last else f"train.batch_ramp has {plural(size, 'sequence')}, which"
            raise ValueError(
                f"{key} is not a multiple of train.micro_batch_size = {train.micro_batch_size} times "
                f"{plural(ranks, 'data-parallel rank')}; change one of them"
            )
        _check_schedule(config, size, together)
    return max(train.batch_sizes) // together


def _check_schedule(config: RunConfig, size: int, together: int) -> None:
    """Refuse an update of `size` sequences, `together` of them in the micro-batches of all data-parallel ranks, that makes a
    number of micro-batches with which the pipeline's schedule cannot run."""
    parallel, train, count = config.parallel, config.train, size // together
    if parallel.can_schedule(count):
        return
    ramp = "" if size == train.global_batch_size else " in train.batch_ramp"
    fitting = [n for n in range(count - 1, 0, -1) if parallel.can_schedule(n)][:1]
    fitting.append(next(n for n in itertools.count(count + 1) if parallel.can_schedule(n)))
    sizes = " or ".join(f"{n} ({plural(n * together, 'sequence')})" for n in fitting)
    counted = plural(count, "micro-batch", "micro-batches")
    raise ValueError(
        f"an update of {plural(size, 'sequence')}{ramp} is {counted} per rank, with which "
        f"parallel.pipeline_schedule = '{parallel.pipeline_schedule}' of {parallel.pipeline_parallel_size} ranks cannot run; "
        f"use {sizes}, or another train.micro_batch_size"
    )
