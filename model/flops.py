"""Floating-point operations of a network, summed over its layers. A multiplication and an addition are two."""

from functools import lru_cache

from model.block import TransformerBlock
from model.config import ModelConfig
from model.parallel.pipeline import cut_evenly
from model.sizes import has_last, planned_blocks, planned_network


@lru_cache(maxsize=1024)
def matrix_flops_per_token(config: ModelConfig, layers: tuple[int, ...] | None = None) -> float:
    """Forward FLOPs per token in the linear layers and the head: 2 per weight; the embedding is a lookup.

    Args:
        layers: of these only, and of the head where the last layer is among them; default all.
    """
    blocks, network = planned_blocks(config, layers), planned_network(config)
    sublayers = sum(sublayer.matrix_flops() for block in blocks for sublayer in block.sublayers)
    return sublayers + (network.head.matrix_flops() if has_last(config, layers) else 0.0)


@lru_cache(maxsize=1024)
def attention_flops_per_token(
    config: ModelConfig, sequence_length: int, causal: bool, layers: tuple[int, ...] | None = None
) -> float:  # fmt: skip
    """Forward FLOPs per token in q.k and in the sum over values, averaged over the sequence; `causal` as
    model.attention.base.Attention.score_flops, `layers` as above."""
    return sum(block.self_attn.score_flops(sequence_length, causal) for block in planned_blocks(config, layers))


@lru_cache(maxsize=32)
def stage_bounds(config: ModelConfig, sequence_length: int, stages: int) -> tuple[int, ...]:
    """PipelineParallel.bounds of stages that cost as evenly as can be: blocks by their products and causal scores, and the last
    stage the head. The embedding and norms are next to nothing.

    Raises:
        ValueError: more stages than layers, in one sentence.
    """
    layers = config.num_hidden_layers
    if stages > layers:
        raise ValueError(
            f"model.num_hidden_layers = {layers} cannot be cut into {stages} pipeline stages; use at most {layers}"
        )
    network = planned_network(config)
    costs = [_block_flops(block, sequence_length) for block in network.blocks]
    costs[-1] += network.head.matrix_flops()
    return cut_evenly(costs, stages)


def _block_flops(block: TransformerBlock, sequence_length: int) -> float:
    products = sum(sublayer.matrix_flops() for sublayer in block.sublayers)
    return products + block.self_attn.score_flops(sequence_length, causal=True)


def flops_per_token(
    config: ModelConfig, sequence_length: int, causal: bool, layers: tuple[int, ...] | None = None
) -> float:  # fmt: skip
    """FLOPs per token, forward and backward (twice the forward), without recomputation; `layers` as above.

    This is the numerator of MFU: 6 per weight that multiplies (a tied head counted once, as a head) plus attention.
    """
    attention = attention_flops_per_token(config, sequence_length, causal, layers)
    return 3.0 * (matrix_flops_per_token(config, layers) + attention)
