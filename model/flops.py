"""What a network costs, from its sizes alone: parameters, floating-point operations, bytes of activations."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Literal

from model.config import ModelConfig

Part = Literal["embedding", "attention", "mlp", "norms", "head"]


@dataclass(frozen=True)
class Tensor:
    """One parameter of the network before it is made.

    `split` is the dimension cut over tensor-parallel ranks, None = every rank holds all of it.
    """

    name: str
    part: Part
    shape: tuple[int, ...]
    split: int | None

    @property
    def numbers(self) -> int:
        """Numbers in the full tensor."""
        return prod(self.shape)

    def numbers_per_rank(self, tensor_parallel_size: int) -> int:
        """Numbers that one tensor-parallel rank holds."""
        return self.numbers // tensor_parallel_size if self.split is not None else self.numbers


def tensors(config: ModelConfig) -> list[Tensor]:
    """Every parameter, in the decoder's order, each once (a tied head has none of its own)."""
    vocab, width, mlp = config.vocab_size, config.hidden_size, config.intermediate_size
    found = [Tensor("model.embed_tokens.weight", "embedding", (vocab, width), 0)]
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        found.append(Tensor(prefix + "input_layernorm.weight", "norms", (width,), None))
        found.extend(_attention(config, prefix + "self_attn."))
        found.append(Tensor(prefix + "post_attention_layernorm.weight", "norms", (width,), None))
        found.append(Tensor(prefix + "mlp.gate_proj.weight", "mlp", (mlp, width), 0))
        found.append(Tensor(prefix + "mlp.up_proj.weight", "mlp", (mlp, width), 0))
        found.append(Tensor(prefix + "mlp.down_proj.weight", "mlp", (width, mlp), 1))
    found.append(Tensor("model.norm.weight", "norms", (width,), None))
    if not config.tie_word_embeddings:
        found.append(Tensor("lm_head.weight", "head", (vocab, width), 0))
    elif config.tied_head == "projection":
        found.append(Tensor("lm_projection.weight", "head", (width, width), None))
    return found


def _attention(config: ModelConfig, prefix: str) -> Iterator[Tensor]:
    width, heads = config.hidden_size, config.num_attention_heads
    queries = heads * config.head_size
    if config.attention == "mla":
        latent, rotary = config.kv_lora_rank or 0, config.qk_rope_head_dim or 0
        if config.q_lora_rank:
            yield Tensor(prefix + "q_a_proj.weight", "attention", (config.q_lora_rank, width), None)
            yield Tensor(prefix + "q_a_layernorm.weight", "norms", (config.q_lora_rank,), None)
            yield Tensor(prefix + "q_b_proj.weight", "attention", (queries, config.q_lora_rank), 0)
        else:
            yield Tensor(prefix + "q_proj.weight", "attention", (queries, width), 0)
        yield Tensor(prefix + "kv_a_proj_with_mqa.weight", "attention", (latent + rotary, width), None)
        yield Tensor(prefix + "kv_a_layernorm.weight", "norms", (latent,), None)
        expanded = heads * ((config.qk_nope_head_dim or 0) + config.value_size)
        yield Tensor(prefix + "kv_b_proj.weight", "attention", (expanded, latent), 0)
    else:
        yield Tensor(prefix + "q_proj.weight", "attention", (queries, width), 0)
        yield Tensor(prefix + "k_proj.weight", "attention", (config.kv_heads * config.head_size, width), 0)
        yield Tensor(prefix + "v_proj.weight", "attention", (config.kv_heads * config.head_size, width), 0)
        if config.qk_norm == "rms":
            yield Tensor(prefix + "q_norm.weight", "norms", (config.head_size,), None)
            yield Tensor(prefix + "k_norm.weight", "norms", (config.head_size,), None)
    yield Tensor(prefix + "o_proj.weight", "attention", (width, heads * config.value_size), 1)


def parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters by part: embedding, attention, mlp, norms, head (0 when tied to the embedding) and total."""
    counts = dict.fromkeys(("embedding", "attention", "mlp", "norms", "head"), 0)
    for tensor in tensors(config):
        counts[tensor.part] += tensor.numbers
    return counts | {"total": sum(counts.values())}


def matrix_flops_per_token(config: ModelConfig) -> float:
    """Forward floating-point operations a token in the linear layers and the head: 2 a weight; the embedding is a lookup."""
    weights = sum(tensor.numbers for tensor in tensors(config) if len(tensor.shape) == 2 and tensor.part != "embedding")
    if config.tie_word_embeddings:
        weights += config.vocab_size * config.hidden_size
    return 2.0 * weights


def attention_flops_per_token(config: ModelConfig, sequence_length: int, causal: bool) -> float:
    """Forward floating-point operations a token in q.k and in the sum over values, averaged over the sequence.

    With `causal` the scores on and below the diagonal (inside the window of a windowed layer) are counted, without it all
    that a kernel without a mask would form. The two regions of ReRoPE together are the scores of one causal attention.
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
    """Floating-point operations a token, forward and backward (twice the forward), without recomputation.

    This is the numerator of MFU: 6 a weight that multiplies (the tied head counted once, as a head) plus attention.
    """
    return 3.0 * (matrix_flops_per_token(config) + attention_flops_per_token(config, sequence_length, causal))
