"""Bytes that the forward pass keeps for the backward pass, summed over the layers of a network."""

from dataclasses import dataclass, replace
from functools import lru_cache

from model.config import ModelConfig
from model.sizes import has_last, planned_network
from model.sublayer import Execution, norm_bytes


@dataclass(frozen=True)
class Activations:
    """Bytes that one rank holds for the backward of one micro-batch."""

    kept: int
    """Of all blocks and the final norm, when the forward has ended."""
    recomputed: int
    """Of one block while the backward recomputes it."""
    loss: int
    """On top, during the loss: a chunk of logits, its gradient, the gradients of the hidden states and the head."""


def activations(
    config: ModelConfig, tokens: int, sequence_length: int, execution: Execution, layers: tuple[int, ...] | None = None
) -> Activations:
    """Bytes of a micro-batch of which a rank has `tokens` tokens, in sequences of `sequence_length`; of context-parallel ranks
    that which holds most.

    Args:
        layers: of these only, and of the final norm and the loss where the last layer is among them; default all.

    Raises:
        ValueError: an unknown value of recompute.
    """
    bytes_per_token, last = _bytes_of_blocks(config, sequence_length, execution), has_last(config, layers)
    blocks = bytes_per_token if layers is None else [bytes_per_token[layer] for layer in layers]
    eager = replace(execution, compiled=False)  # only blocks are compiled
    norm = norm_bytes(execution.stream(config.hidden_size), eager, config.zero_centered_gains) if last else 0
    kept, recomputed = sum(kept for kept, _ in blocks) + norm, max(recomputed for _, recomputed in blocks)
    head = planned_network(config, execution.tensor_parallel_size).head
    return Activations(round(tokens * kept), round(tokens * recomputed), head.loss_bytes(tokens, execution) if last else 0)


@lru_cache(maxsize=256)
def _bytes_of_blocks(config: ModelConfig, sequence_length: int, execution: Execution) -> tuple[tuple[float, float], ...]:
    """Per token and block: what is kept, and what is held while it is recomputed."""
    blocks = planned_network(config, execution.tensor_parallel_size).blocks
    return tuple(block.kept(execution, sequence_length) for block in blocks)
