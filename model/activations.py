"""Bytes that the forward pass keeps for the backward pass, summed over the layers of a network."""

from dataclasses import dataclass, replace
from functools import lru_cache

from model.config import ModelConfig
from model.sizes import planned_network
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


def activations(config: ModelConfig, tokens: int, sequence_length: int, execution: Execution) -> Activations:
    """Bytes of a micro-batch of which a rank has `tokens` tokens, in sequences of `sequence_length`; of context-parallel ranks
    that which holds most.

    Raises:
        ValueError: an unknown value of recompute.
    """
    kept, recomputed = _per_token(config, sequence_length, execution)
    head = planned_network(config, execution.tensor_parallel_size).lm_head
    return Activations(round(tokens * kept), round(tokens * recomputed), head.loss_bytes(tokens, execution))


@lru_cache(maxsize=256)
def _per_token(config: ModelConfig, sequence_length: int, execution: Execution) -> tuple[float, float]:
    network = planned_network(config, execution.tensor_parallel_size)
    blocks = [block.kept(execution, sequence_length) for block in network.blocks]
    eager = replace(execution, compiled=False)  # only blocks are compiled
    norm = norm_bytes(execution.stream(config.hidden_size), eager, config.zero_centered_gains)
    kept = sum(kept for kept, _ in blocks) + norm
    return kept, max(recomputed for _, recomputed in blocks)
