"""Weights as Hugging Face's stock architectures have them.

Names are Hugging Face's already (Llama's, DeepSeek's for latent attention), so what remains is the output head.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import ModelConfig
from model.parallel.layers import identity
from model.sizes import full_shapes


@dataclass(frozen=True)
class ExportedTensor:
    """One tensor of an exported model: `make` of the network's tensors named `parts`, in this order."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    make: Callable[..., Tensor]


def exported_tensors(model: ModelConfig) -> list[ExportedTensor]:
    """The tensors of the exported model.

    A tied head that stock architectures do not know becomes an untied one with the same logits: the half-swap of the
    hidden state moves into the rows of the head, a projection is multiplied into them (Su 2023,
    kexue.fm/archives/9698).
    """
    shapes, projection = full_shapes(model), "lm_head.projection.weight"
    exported = [ExportedTensor(name, shape, (name,), identity) for name, shape in shapes.items() if name != projection]
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    if not model.tie_word_embeddings:
        return exported
    match model.tied_head:
        case "plain" | "small-init":
            return exported
        case "half-swap":
            return [*exported, ExportedTensor(head, shapes[embedding], (embedding,), swap_halves)]
        case "projection":
            return [*exported, ExportedTensor(head, shapes[embedding], (embedding, projection), _multiply_projection)]
        case _:
            raise ValueError(f"model.tied_head = '{model.tied_head}'; legal: half-swap, plain, projection, small-init")


def swap_halves(weight_VD: Tensor) -> Tensor:
    """Exchange the halves of every row: W' h = W swap(h)."""
    return torch.cat(weight_VD.chunk(2, dim=-1)[::-1], dim=-1)


def _multiply_projection(weight_VD: Tensor, projection_DD: Tensor) -> Tensor:
    """W' h = W (P h), in float32."""
    return (weight_VD.float() @ projection_DD.float()).to(weight_VD.dtype)
