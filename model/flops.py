"""Floating-point operations of a network, summed over its layers. A multiplication and an addition are two."""

from functools import lru_cache

from model.config import ModelConfig
from model.sizes import planned_network


@lru_cache(maxsize=32)
def matrix_flops_per_token(config: ModelConfig) -> float:
    """Forward FLOPs per token in the linear layers and the head: 2 per weight; the embedding is a lookup."""
    network = planned_network(config)
    sublayers = sum(sublayer.matrix_flops() for block in network.blocks for sublayer in block.sublayers)
    return sublayers + network.lm_head.matrix_flops()


@lru_cache(maxsize=32)
def attention_flops_per_token(config: ModelConfig, sequence_length: int, causal: bool) -> float:
    """Forward FLOPs per token in q.k and in the sum over values, averaged over the sequence; `causal` as
    model.attention.base.Attention.score_flops."""
    return sum(block.self_attn.score_flops(sequence_length, causal) for block in planned_network(config).blocks)


def flops_per_token(config: ModelConfig, sequence_length: int, causal: bool) -> float:
    """FLOPs per token, forward and backward (twice the forward), without recomputation.

    This is the numerator of MFU: 6 per weight that multiplies (a tied head counted once, as a head) plus attention.
    """
    return 3.0 * (matrix_flops_per_token(config) + attention_flops_per_token(config, sequence_length, causal))
