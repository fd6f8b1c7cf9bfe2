"""Evaluation at contexts whose rows pass through the network in chunks: how many forwards it takes, and whether it fits."""

from collections.abc import Sequence

from data.corpus.validation import Validation
from launch.config import RunConfig
from launch.planner.memory import element_bytes
from launch.planner.pipeline import portions
from model.attention.row_cache import cached_tokens
from model.positions.config import PositionConfig
from trainer.config import ParallelConfig
from trainer.monitoring.progress import format_bytes


def forwards_at(text: Validation, context: int | None, chunk_tokens: int) -> int:
    """Forwards in which a rank evaluates at a context, or at the training length without one."""
    chunks = -(-context // chunk_tokens) if context and chunk_tokens else 1
    return text.batches(context) * chunks


def row_cache_bytes(config: RunConfig, position: PositionConfig, context: int) -> int:
    """Bytes that a rank keeps of earlier chunks at a context, at most; 0 where rows are not cut."""
    chunk, train, parallel = config.evaluate.chunk_tokens, config.train, config.parallel
    if not 0 < chunk < context:
        return 0
    rows = max(1, train.micro_batch_size * train.sequence_length // context)
    width = config.model.kinds[0].cached_width(config.model, parallel.tensor_parallel_size)
    tokens = cached_tokens(config.model, position, context, chunk, parallel.context_parallel_size)
    ranks, stages = parallel.pipeline_parallel_size, parallel.pipeline_stages
    held = portions(config.model, train.sequence_length, ranks, stages // ranks)
    most = max(sum(tokens[layer] for layer in portion.layers) for portion in held)
    return rows * most * width * element_bytes(config)


def check_contexts_of_run(config: RunConfig, capacity_bytes: float) -> None:
    """Refuse evaluate.contexts whose cache alone is larger than the memory of a rank.

    Raises:
        ValueError: one is.
    """
    evaluate = config.evaluate
    advice = (
        "leave it out, or use more ranks with a larger parallel.tensor_parallel_size, parallel.context_parallel_size or "
        "parallel.pipeline_parallel_size"
    )
    _check(config, evaluate.contexts, evaluate.position or config.position, capacity_bytes, ("evaluate.contexts", advice))


def check_contexts_alone(config: RunConfig, contexts: Sequence[int], position: PositionConfig, capacity_bytes: float) -> None:
    """The same of contexts at which one process evaluates what a run has trained."""
    advice = "leave it out, or measure it in a run (evaluate.contexts), whose tensor- and context-parallel ranks share them"
    alone = config.model_copy(update={"parallel": ParallelConfig()})
    _check(alone, contexts, position, capacity_bytes, ("contexts", advice))


def _check(
    config: RunConfig, contexts: Sequence[int], position: PositionConfig, capacity_bytes: float, said: tuple[str, str]
) -> None:
    context = max(contexts, default=0)
    if (wanted := row_cache_bytes(config, position, context)) > capacity_bytes:
        raise ValueError(
            f"{said[0]}: keys and values of a context of {context:,} tokens take {format_bytes(wanted)} of each rank's memory, "
            f"which has {format_bytes(capacity_bytes)}; {said[1]}"
        )
