"""Tensors of a network as stock architectures have them, in and out.

Ours are named as Llama's, OLMo's, Gemma's and DeepSeek's are, so what remains is the output head, tensors that a family has
fused or named otherwise, and experts, each of which has tensors of its own in published files, and which transformers 5 stacks
in a file if it is told to.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import ModelConfig
from model.feed_forward.router import BIAS
from model.huggingface.family import Family
from model.parallel.layers import identity
from model.sizes import full_shapes

EMBEDDING, HEAD, PROJECTION = "model.embed_tokens.weight", "lm_head.weight", "lm_head.projection.weight"
EXPERT, STACK = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight"), ".gate_up_proj"
"""Our name for a matrix of an expert; the end of transformers' name for the stack of gates, each above its up projection."""


@dataclass(frozen=True)
class StockTensor:
    """One tensor of a stock model: `make` of the network's tensors named `parts`, in this order."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    make: Callable[..., Tensor] = identity
    precise: bool = False
    """It keeps the precision in which it is stored."""


@dataclass(frozen=True)
class StoredRows:
    """Where a tensor of the network lies in a stock model: rows of one of its tensors."""

    name: str
    start: int
    shape: tuple[int, ...]
    """Of the network's tensor; its first number is the number of rows."""
    expert: int | None = None
    """Which matrix it is in a stack of them [experts, rows, columns]; None: it is in none."""


def exported_tensors(model: ModelConfig, family: Family) -> list[StockTensor]:
    """The tensors of the exported model.

    A tied head that stock architectures do not know becomes an untied one with the same logits: the half-swap of the
    hidden state moves into the rows of the head, a projection is multiplied into them (Su 2023,
    kexue.fm/archives/9698).
    """
    shapes = full_shapes(model)
    fused = {part: (whole, parts) for whole, parts in _fused(model, family).items() for part in parts}
    exported = []
    for name, shape in shapes.items():
        if name == PROJECTION:
            continue
        whole, parts = fused.get(name, (family.stored_name(name), (name,)))
        if name == parts[0]:
            rows, make = sum(shapes[part][0] for part in parts), identity if len(parts) == 1 else _stacked
            exported.append(StockTensor(whole, (rows, *shape[1:]), parts, make, name.endswith(BIAS)))
    return exported + _untied_head(model, shapes)


def _untied_head(model: ModelConfig, shapes: dict[str, tuple[int, ...]]) -> list[StockTensor]:
    if not model.tie_word_embeddings:
        return []
    match model.tied_head:
        case "plain" | "small-init":
            return []
        case "half-swap":
            return [StockTensor(HEAD, shapes[EMBEDDING], (EMBEDDING,), swap_halves)]
        case "projection":
            return [StockTensor(HEAD, shapes[EMBEDDING], (EMBEDDING, PROJECTION), _multiply_projection)]
        case _:
            raise ValueError(f"model.tied_head = '{model.tied_head}'; legal: half-swap, plain, projection, small-init")


def stored_rows(model: ModelConfig, family: Family, stacked: bool = False) -> dict[str, StoredRows]:
    """Where each tensor of the network lies in a model of the family, in the order of the network.

    Args:
        stacked: the files have the experts of a layer in stacks, and transformers' names for all else.
    """
    shapes = full_shapes(model)
    if stacked:
        return {name: _in_stack(name, shape) for name, shape in shapes.items()}
    places = {name: StoredRows(family.stored_name(name), 0, shape) for name, shape in shapes.items()}
    for whole, parts in _fused(model, family).items():
        start = 0
        for part in parts:
            places[part] = StoredRows(whole, start, shapes[part])
            start += shapes[part][0]
    return places


def stored_shapes(places: dict[str, StoredRows]) -> dict[str, tuple[int, ...]]:
    """Full shape of every tensor of the stock model."""
    shapes: dict[str, tuple[int, ...]] = {}
    for place in places.values():
        stack = () if place.expert is None else (place.expert + 1,)
        needed = (*stack, place.start + place.shape[0], *place.shape[1:])
        shapes[place.name] = tuple(map(max, shapes.get(place.name, needed), needed))
    return shapes


def has_stacks(names: Iterable[str]) -> bool:
    """Whether files with tensors of these names have experts in stacks."""
    return any(name.endswith(STACK) for name in names)


def _in_stack(name: str, shape: tuple[int, ...]) -> StoredRows:
    found = EXPERT.fullmatch(name)
    if found is None:
        return StoredRows(name, 0, shape)
    prefix, expert, part = found.groups()
    stack = f"{prefix}.down_proj" if part == "down" else prefix + STACK
    return StoredRows(stack, shape[0] if part == "up" else 0, shape, int(expert))


def _fused(model: ModelConfig, family: Family) -> dict[str, tuple[str, ...]]:
    """Fused tensors of all layers: their name -> ours, from the first row on."""
    prefixes = [f"model.layers.{layer}." for layer in range(model.num_hidden_layers)]
    return {
        prefix + whole: tuple(prefix + part for part in parts) for prefix in prefixes for whole, parts in family.fused.items()
    }


def _stacked(*parts: Tensor) -> Tensor:
    return torch.cat(parts)


def swap_halves(weight_VD: Tensor) -> Tensor:
    """Exchange the halves of every row: W' h = W swap(h)."""
    return torch.cat(weight_VD.chunk(2, dim=-1)[::-1], dim=-1)


def _multiply_projection(weight_VD: Tensor, projection_DD: Tensor) -> Tensor:
    """W' h = W (P h), in float32."""
    return (weight_VD.float() @ projection_DD.float()).to(weight_VD.dtype)
