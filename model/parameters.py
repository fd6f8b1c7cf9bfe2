"""Parameters of a network from its sizes alone: name, shape, kind, and how tensor parallelism splits each."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

from torch import nn

from model.config import ModelConfig

ParameterKind = Literal["matrix", "embedding", "gain", "bias"]


@dataclass(frozen=True)
class ParameterSpec:
    """Kind and full shape of a parameter, of which a rank may hold a slice."""

    kind: ParameterKind
    shape: tuple[int, ...]
    """Shape of the full tensor, over all tensor-parallel ranks."""
    split: int | None
    """Dimension split over tensor-parallel ranks; None = every rank holds the whole."""


def set_spec(parameter: nn.Parameter, kind: ParameterKind, shape: tuple[int, ...], split: int | None) -> None:
    """Attach a ParameterSpec as `parameter.spec`, and to a split parameter Megatron's flag `tensor_model_parallel`, by which
    DeepSpeed counts it once per tensor-parallel rank in norms (others once)."""
    parameter.spec = ParameterSpec(kind, shape, split)  # type: ignore[attr-defined]
    if split is not None:
        parameter.tensor_model_parallel = True  # type: ignore[attr-defined]


def local_slice(spec: ParameterSpec, size: int, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and start, in the full tensor, of the slice of tensor-parallel rank `rank` of `size`."""
    shape, start = list(spec.shape), [0] * len(spec.shape)
    if spec.split is not None:
        shape[spec.split] //= size
        start[spec.split] = shape[spec.split] * rank
    return tuple(shape), tuple(start)


ParameterPart = Literal["embedding", "attention", "mlp", "norms", "head"]


@dataclass(frozen=True)
class ParameterShape:
    """One parameter of a network that need not exist."""

    name: str
    part: ParameterPart
    shape: tuple[int, ...]
    """Of the full tensor."""
    split: int | None
    """Dimension split over tensor-parallel ranks; None = every rank holds the whole."""
    heads: int | None = None
    """Heads that the split runs between: a tensor-parallel size that does not divide them leaves the tensor whole."""

    @property
    def elements(self) -> int:
        """Elements of the full tensor."""
        return prod(self.shape)

    def elements_per_rank(self, tensor_parallel_size: int) -> int:
        """Elements that one tensor-parallel rank holds."""
        split = self.split is not None and not (self.heads and self.heads % tensor_parallel_size)
        return self.elements // tensor_parallel_size if split else self.elements


def parameter_shapes(config: ModelConfig) -> list[tuple[ParameterShape, int]]:
    """Every distinct parameter, those of blocks under their names in layer 0, and how many there are of each."""
    V, D, F, layers = config.vocab_size, config.hidden_size, config.intermediate_size, config.num_hidden_layers
    prefix = "model.layers.0."
    block = [
        ParameterShape(prefix + "input_layernorm.weight", "norms", (D,), None),
        *_attention(config, prefix + "self_attn."),
        ParameterShape(prefix + "post_attention_layernorm.weight", "norms", (D,), None),
        ParameterShape(prefix + "mlp.gate_proj.weight", "mlp", (F, D), 0),
        ParameterShape(prefix + "mlp.up_proj.weight", "mlp", (F, D), 0),
        ParameterShape(prefix + "mlp.down_proj.weight", "mlp", (D, F), 1),
    ]
    shapes = [(ParameterShape("model.embed_tokens.weight", "embedding", (V, D), 0), 1)]
    shapes += [(tensor, layers) for tensor in block]
    shapes.append((ParameterShape("model.norm.weight", "norms", (D,), None), 1))
    if not config.tie_word_embeddings:
        shapes.append((ParameterShape("lm_head.weight", "head", (V, D), 0), 1))
    elif config.tied_head == "projection":
        shapes.append((ParameterShape("lm_head.projection.weight", "head", (D, D), None), 1))
    return shapes


def all_parameters(config: ModelConfig) -> list[ParameterShape]:
    """Every parameter, each once (a tied head has none of its own)."""
    parameters = []
    for tensor, count in parameter_shapes(config):
        names = [tensor.name.replace(".0.", f".{layer}.", 1) for layer in range(count)] if count > 1 else [tensor.name]
        parameters.extend(replace(tensor, name=name) for name in names)
    return parameters


def kind_of(parameter: ParameterShape) -> ParameterKind:
    """The kind of a parameter."""
    match parameter.part:
        case "embedding":
            return "embedding"
        case "norms":
            return "gain"
        case _:
            return "matrix"


def elements_per_rank(config: ModelConfig, tensor_parallel_size: int) -> list[int]:
    """Elements of every parameter on a tensor-parallel rank, in the order of the network."""
    elements, block = [], []
    for tensor, _ in parameter_shapes(config):
        in_block = tensor.name.startswith("model.layers.")
        if block and not in_block:
            elements, block = [*elements, *block * config.num_hidden_layers], []
        (block if in_block else elements).append(tensor.elements_per_rank(tensor_parallel_size))
    return elements


def _attention(config: ModelConfig, prefix: str) -> Iterator[ParameterShape]:
    D, N, H = config.hidden_size, config.num_attention_heads, config.head_size
    if config.attention == "mla":
        latent, rope = config.kv_lora_rank or 0, config.qk_rope_head_dim or 0
        if config.q_lora_rank:
            yield ParameterShape(prefix + "q_a_proj.weight", "attention", (config.q_lora_rank, D), None)
            yield ParameterShape(prefix + "q_a_layernorm.weight", "norms", (config.q_lora_rank,), None)
            yield ParameterShape(prefix + "q_b_proj.weight", "attention", (N * H, config.q_lora_rank), 0)
        else:
            yield ParameterShape(prefix + "q_proj.weight", "attention", (N * H, D), 0)
        yield ParameterShape(prefix + "kv_a_proj_with_mqa.weight", "attention", (latent + rope, D), None)
        yield ParameterShape(prefix + "kv_a_layernorm.weight", "norms", (latent,), None)
        expanded = N * ((config.qk_nope_head_dim or 0) + config.value_size)
        yield ParameterShape(prefix + "kv_b_proj.weight", "attention", (expanded, latent), 0)
    else:
        yield ParameterShape(prefix + "q_proj.weight", "attention", (N * H, D), 0)
        for name in ("k_proj", "v_proj"):
            yield ParameterShape(f"{prefix}{name}.weight", "attention", (config.kv_heads * H, D), 0, config.kv_heads)
    yield ParameterShape(prefix + "o_proj.weight", "attention", (D, N * config.value_size), 1)
    if config.attention == "gqa" and config.qk_norm == "rms":
        yield ParameterShape(prefix + "q_norm.weight", "norms", (H,), None)
        yield ParameterShape(prefix + "k_norm.weight", "norms", (H,), None)


def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """Number of parameters by part: embedding, attention, mlp, norms, head (0 when tied to the embedding) and total."""
    counts = dict.fromkeys(("embedding", "attention", "mlp", "norms", "head"), 0)
    for tensor, count in parameter_shapes(config):
        counts[tensor.part] += count * tensor.elements
    return counts | {"total": sum(counts.values())}
