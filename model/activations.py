"""Bytes that the forward pass keeps for the backward pass, by hand count."""

from dataclasses import dataclass

import torch

from model import loss
from model.attention.kernels import cpu_dense
from model.attention.kernels.dispatch import AttentionProblem, preferred_backend
from model.config import ModelConfig


@dataclass(frozen=True)
class Activations:
    """Bytes that one rank holds for the backward of one micro-batch."""

    kept: int
    """Of all blocks and the final norm, when the forward has ended."""
    recomputed: int
    """Of one block while the backward recomputes it."""
    loss: int
    """On top, during the loss: a chunk of logits, its gradient, the gradients of the hidden states and the head."""


@dataclass(frozen=True)
class Execution:
    """How a rank runs the network, as far as its activations depend on it."""

    element_bytes: int
    """Of an activation: 2 for bf16, 4 for fp32."""
    tensor_parallel_size: int = 1
    sequence_parallel: bool = False
    recompute: str = "none"
    """"full" keeps each block's input; "selective" keeps the results of matrix products and attention and recomputes norms,
    rotations and the mlp's pointwise part."""
    device: str = "cuda"
    """"cuda" or "cpu", which has another kernel for short sequences and smaller chunks of logits."""
    compiled: bool = False
    """Whether blocks are compiled, which then recompute what needs no pass over memory of its own, and the loss, of which a
    GPU then takes larger chunks."""
    regions: int = 1
    """Regions of attention: 2 where distances beyond a window are rotated by another rule."""


def activations(config: ModelConfig, tokens: int, sequence_length: int, execution: Execution) -> Activations:
    """Bytes of a micro-batch of `tokens` tokens in sequences of `sequence_length`.

    Raises:
        ValueError: an unknown value of recompute.
    """
    element, size, compiled = execution.element_bytes, execution.tensor_parallel_size, execution.compiled
    stream = config.hidden_size / (size if execution.sequence_parallel else 1)
    # RMSNorm saves its input in float32 and the normed values; its output is saved, whole, by the next matrix product
    norm = stream * (4 + element)
    products, attention = _attention_bytes(config, execution, _dense_keys(config, execution, sequence_length))
    mlp = config.intermediate_size / size * element
    # compiled, a norm keeps its input as it is and one float32 per token, and SiLU is recomputed
    norms = 2 * ((stream * element + 4 if compiled else norm) + config.hidden_size * element)
    block = norms + attention + (3 if compiled else 4) * mlp
    match execution.recompute:
        case "none" | "auto":
            layer, recomputed = block, 0.0
        case "selective":
            layer = (2 if compiled else 3) * stream * element + products + 2 * mlp
            recomputed = block
        case "full":
            layer, recomputed = stream * element, block
        case _:
            raise ValueError(f"recompute = '{execution.recompute}' must be none, selective, full or auto")
    kept = tokens * (layer * config.num_hidden_layers + norm)
    return Activations(round(kept), round(tokens * recomputed), _loss_bytes(config, tokens, execution))


def _dense_keys(config: ModelConfig, execution: Execution, sequence_length: int) -> float:
    """Probabilities kept per query, on average, by the CPU's dense kernel: a block of queries meets the keys up to its end.
    0 where another kernel runs."""
    dtype, two_regions = torch.bfloat16 if execution.element_bytes == 2 else torch.float32, execution.regions > 1
    problem = AttentionProblem(
        execution.device, dtype, config.head_size, config.value_size, sequence_length,
        window=sequence_length if two_regions else None, two_regions=two_regions, compiled=execution.compiled,
    )  # fmt: skip
    if preferred_backend(problem) != "cpu_dense":
        return 0.0
    ends = [min(start + cpu_dense.DENSE_ROWS, sequence_length) for start in range(0, sequence_length, cpu_dense.DENSE_ROWS)]
    return sum((end - start) * end for start, end in zip([0, *ends], ends, strict=False)) / sequence_length


def _attention_bytes(config: ModelConfig, execution: Execution, dense_keys: float) -> tuple[float, float]:
    """Bytes per token: (results of the matrix products and of attention, all that the backward of attention needs)."""
    element, compiled = execution.element_bytes, execution.compiled
    n, H = config.num_attention_heads / execution.tensor_parallel_size, config.head_size
    k = max(1.0, config.kv_heads / execution.tensor_parallel_size) if config.attention == "gqa" else n
    qkv = n * H + k * (H + config.value_size)
    out = n * config.value_size
    products = saved = element * (qkv + out) + 4 * n
    if dense_keys:  # keys and values repeated for every query head, the result twice, the probabilities
        products = element * (qkv + out + n * dense_keys)
        saved = element * n * (2 * H + 3 * config.value_size + dense_keys)
    saved += element * (execution.regions - 1) * (n + k) * H
    if config.attention == "gqa":
        normed = {"none": 0.0, "rms": n + k, "key-l2": k}[config.qk_norm]
        return products, saved + normed * (H * element + 4 if compiled else H * (4 + element))
    latents = (config.q_lora_rank or 0) + (config.kv_lora_rank or 0)
    nope = config.qk_nope_head_dim or 0
    projected = element * (latents + config.rotary_size + n * (H + nope + config.value_size))
    products = projected + element * (out + n * dense_keys) + 4 * n
    if compiled:  # latents before and after their norms; the values are slices of the tensor they were projected with
        return products, saved + element * (2 * (latents + config.rotary_size) + n * nope)
    return products, saved + latents * (4 + 2 * element)


def _loss_bytes(config: ModelConfig, tokens: int, execution: Execution) -> int:
    """A chunk of logits with its gradient, the gradient of the head (one chunk needs no float32 sum) and of the states."""
    element, size = execution.element_bytes, execution.tensor_parallel_size
    vocabulary, compiled = config.vocab_size // size, execution.compiled and size == 1
    rows = loss.chunk_tokens(execution.device, vocabulary, tokens, compiled)
    logit = 2 * element if compiled and execution.device == "cuda" else 4 + (element if element < 4 else 0)
    head = vocabulary * config.hidden_size * (element if rows == tokens else 4 + element)
    return rows * vocabulary * logit + head + tokens * config.hidden_size * element
