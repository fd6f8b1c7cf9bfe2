"""What a network costs, from its sizes alone: parameters, floating-point operations, bytes of activations."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

from model import flash_cpu, loss, short
from model.config import ModelConfig

Part = Literal["embedding", "attention", "mlp", "norms", "head"]


@dataclass(frozen=True)
class Tensor:
    """One parameter of the network before it is made.

    `split` is the dimension cut over tensor-parallel ranks, None = every rank holds all of it.
    `heads` is set where the cut goes between heads: ranks that do not divide them hold all of it.
    """

    name: str
    part: Part
    shape: tuple[int, ...]
    split: int | None
    heads: int | None = None

    @property
    def numbers(self) -> int:
        """Numbers in the full tensor."""
        return prod(self.shape)

    def numbers_per_rank(self, tensor_parallel_size: int) -> int:
        """Numbers that one tensor-parallel rank holds."""
        cut = self.split is not None and not (self.heads and self.heads % tensor_parallel_size)
        return self.numbers // tensor_parallel_size if cut else self.numbers


def kinds(config: ModelConfig) -> list[tuple[Tensor, int]]:
    """Every sort of parameter, under its name in layer 0, and how many there are of it."""
    vocab, width, mlp, layers = config.vocab_size, config.hidden_size, config.intermediate_size, config.num_hidden_layers
    prefix = "model.layers.0."
    block = [
        Tensor(prefix + "input_layernorm.weight", "norms", (width,), None),
        *_attention(config, prefix + "self_attn."),
        Tensor(prefix + "post_attention_layernorm.weight", "norms", (width,), None),
        Tensor(prefix + "mlp.gate_proj.weight", "mlp", (mlp, width), 0),
        Tensor(prefix + "mlp.up_proj.weight", "mlp", (mlp, width), 0),
        Tensor(prefix + "mlp.down_proj.weight", "mlp", (width, mlp), 1),
    ]
    found = [(Tensor("model.embed_tokens.weight", "embedding", (vocab, width), 0), 1)]
    found += [(tensor, layers) for tensor in block]
    found.append((Tensor("model.norm.weight", "norms", (width,), None), 1))
    if not config.tie_word_embeddings:
        found.append((Tensor("lm_head.weight", "head", (vocab, width), 0), 1))
    elif config.tied_head == "projection":
        found.append((Tensor("lm_head.projection.weight", "head", (width, width), None), 1))
    return found


def tensors(config: ModelConfig) -> list[Tensor]:
    """Every parameter, each once (a tied head has none of its own)."""
    found = []
    for tensor, count in kinds(config):
        names = [tensor.name.replace(".0.", f".{layer}.", 1) for layer in range(count)] if count > 1 else [tensor.name]
        found.extend(replace(tensor, name=name) for name in names)
    return found


def sizes(config: ModelConfig, tensor_parallel_size: int) -> list[int]:
    """Numbers of every parameter on a tensor-parallel rank, in the order of the network."""
    found, block = [], []
    for tensor, _ in kinds(config):
        within = tensor.name.startswith("model.layers.")
        if block and not within:
            found, block = [*found, *block * config.num_hidden_layers], []
        (block if within else found).append(tensor.numbers_per_rank(tensor_parallel_size))
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
        for name in ("k_proj", "v_proj"):
            yield Tensor(f"{prefix}{name}.weight", "attention", (config.kv_heads * config.head_size, width), 0, config.kv_heads)
    yield Tensor(prefix + "o_proj.weight", "attention", (width, heads * config.value_size), 1)
    if config.attention == "gqa" and config.qk_norm == "rms":
        yield Tensor(prefix + "q_norm.weight", "norms", (config.head_size,), None)
        yield Tensor(prefix + "k_norm.weight", "norms", (config.head_size,), None)


def parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters by part: embedding, attention, mlp, norms, head (0 when tied to the embedding) and total."""
    counts = dict.fromkeys(("embedding", "attention", "mlp", "norms", "head"), 0)
    for tensor, count in kinds(config):
        counts[tensor.part] += count * tensor.numbers
    return counts | {"total": sum(counts.values())}


def matrix_flops_per_token(config: ModelConfig) -> float:
    """Forward floating-point operations a token in the linear layers and the head: 2 a weight; the embedding is a lookup."""
    matrices = [(tensor, count) for tensor, count in kinds(config) if len(tensor.shape) == 2 and tensor.part != "embedding"]
    weights = sum(count * tensor.numbers for tensor, count in matrices)
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


@dataclass(frozen=True)
class Activations:
    """Bytes a rank keeps from the forward of one micro-batch for its backward."""

    kept: int
    """Of all blocks and the final norm, when the forward has ended."""
    remade: int
    """Of one block, formed again in the backward under recomputation."""
    loss: int
    """What the loss holds at once on top: a chunk of logits, its gradient, those of the hidden states and the head."""


def activations(
    config: ModelConfig,
    tokens: int,
    sequence_length: int,
    bytes_per_number: int,
    tensor_parallel_size: int = 1,
    sequence_parallel: bool = False,
    recompute: str = "none",
    device: str = "cuda",
    compiled: bool = False,
    regions: int = 1,
) -> Activations:
    """What the network saves for its backward.

    Args:
        tokens: tokens of the micro-batch, in sequences of `sequence_length`.
        bytes_per_number: 2 for bf16, 4 for fp32.
        recompute: "none"; "full" keeps each block's input; "selective" keeps what matrix products and attention made and
            forms norms, rotations and the mlp's pointwise part again.
        device: "cuda" or "cpu", which attends to short sequences by another kernel and takes smaller chunks of logits.
        compiled: whether blocks are: they form again what costs them no pass over memory of its own; and the loss, of which
            a GPU then takes larger chunks.
        regions: of attention: 2 where distances beyond a window turn otherwise.

    Raises:
        ValueError: another word for recompute.
    """
    low, size = bytes_per_number, tensor_parallel_size
    stream = config.hidden_size / (size if sequence_parallel else 1)
    # RMSNorm saves its input in float32 and the normed values; what it gives is saved, whole, by the next matrix product
    norm = stream * (4 + low)
    own_kernel = device == "cpu" and compiled and low == 2 and flash_cpu.serves(config.head_size, config.value_size)
    dense = device == "cpu" and sequence_length <= short.UP_TO and regions == 1 and not own_kernel
    products, attention = _attention_bytes(config, low, size, _dense_keys(sequence_length) if dense else 0.0, regions, compiled)
    mlp = config.intermediate_size / size * low
    # compiled, a norm keeps its input as it is and one number a token, and SiLU is formed again
    block = 2 * ((stream * low + 4 if compiled else norm) + config.hidden_size * low) + attention + (3 if compiled else 4) * mlp
    match recompute:
        case "none" | "auto":
            layer, remade = block, 0.0
        case "selective":
            layer = (2 if compiled else 3) * stream * low + products + 2 * mlp
            remade = block
        case "full":
            layer, remade = stream * low, block
        case _:
            raise ValueError(f"recompute = '{recompute}' must be none, selective, full or auto")
    kept = tokens * (layer * config.num_hidden_layers + norm)
    lost = _loss_bytes(config, tokens, low, size, device, compiled and size == 1)
    return Activations(round(kept), round(tokens * remade), lost)


def _dense_keys(sequence_length: int) -> float:
    """Probabilities that a query keeps, on average: a strip of queries meets the keys up to its end."""
    ends = [min(start + short.ROWS, sequence_length) for start in range(0, sequence_length, short.ROWS)]
    return sum((end - start) * end for start, end in zip([0, *ends], ends, strict=False)) / sequence_length


def _attention_bytes(
    config: ModelConfig, low: int, size: int, dense: float, regions: int, compiled: bool
) -> tuple[float, float]:
    """Bytes a token: (what its matrix products and the attention itself made, all that its backward wants)."""
    heads = config.num_attention_heads / size
    keys = max(1.0, config.kv_heads / size) if config.attention == "gqa" else heads
    rotated = heads * config.head_size + keys * (config.head_size + config.value_size)
    out = heads * config.value_size
    products = seen = low * (rotated + out) + 4 * heads
    if dense:  # keys and values repeated for every query head, the result twice, the probabilities
        products = low * (rotated + out + heads * dense)
        seen = low * heads * (2 * config.head_size + 3 * config.value_size + dense)
    seen += low * (regions - 1) * (heads + keys) * config.head_size
    if config.attention == "gqa":
        normed = {"none": 0.0, "rms": heads + keys, "key-l2": keys}[config.qk_norm]
        return products, seen + normed * (config.head_size * low + 4 if compiled else config.head_size * (4 + low))
    latents = (config.q_lora_rank or 0) + (config.kv_lora_rank or 0)
    up = config.qk_nope_head_dim or 0
    made = low * (latents + config.rotary_size + heads * (config.head_size + up + config.value_size))
    products = made + low * (out + heads * dense) + 4 * heads
    if compiled:  # latents before and after their norms; the values lie beside the keys they were made with
        return products, seen + low * (2 * (latents + config.rotary_size) + heads * up)
    return products, seen + latents * (4 + 2 * low)


def _loss_bytes(config: ModelConfig, tokens: int, low: int, size: int, device: str, compiled: bool) -> int:
    """A chunk of logits with its gradient, the gradient of the head (one chunk needs no float32 sum) and of the states."""
    vocabulary = config.vocab_size // size
    rows = loss.chunk_tokens(device, vocabulary, tokens, compiled)
    number = 2 * low if compiled and device == "cuda" else 4 + (low if low < 4 else 0)
    head = vocabulary * config.hidden_size * (low if rows == tokens else 4 + low)
    return rows * vocabulary * number + head + tokens * config.hidden_size * low
