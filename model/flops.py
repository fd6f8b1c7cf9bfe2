"""Floating-point operations of a network, from its sizes alone. A multiplication and an addition are two."""

from model.config import ModelConfig
from model.parameters import parameter_shapes


def matrix_flops_per_token(config: ModelConfig) -> float:
    """Forward FLOPs per token in the linear layers and the head: 2 per weight; the embedding is a lookup."""
    weights = sum(
        count * tensor.elements
        for tensor, count in parameter_shapes(config)
        if len(tensor.shape) == 2 and tensor.part != "embedding"
    )
    if config.tie_word_embeddings:
        weights += config.vocab_size * config.hidden_size
    return 2.0 * weights


def attention_flops_per_token(config: ModelConfig, sequence_length: int, causal: bool) -> float:
    """Forward FLOPs per token in q.k and in the sum over values, averaged over the sequence.

    With `causal` the scores on and below the diagonal (inside the window of a windowed layer) are counted, without it all
    that a kernel without a mask computes. The two regions of ReRoPE together have the scores of one causal attention.
    """
    scores = 0.0
    for layer in range(config.num_hidden_layers):
        window = sequence_length if config.full_layer(layer) else min(config.sliding_window or 0, sequence_length)
        if causal:
            scores += (window * (window + 1) / 2 + (sequence_length - window) * window) / sequence_length
        else:
            scores += window
    return 2.0 * scores * config.num_attention_heads * (config.head_size + config.value_size)


def flops_per_token(config: ModelConfig, sequence_length: int, causal: bool) -> float:
    """FLOPs per token, forward and backward (twice the forward), without recomputation.

    This is the numerator of MFU: 6 per weight that multiplies (a tied head counted once, as a head) plus attention.
    """
    return 3.0 * (matrix_flops_per_token(config) + attention_flops_per_token(config, sequence_length, causal))
