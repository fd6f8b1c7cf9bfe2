"""Positions of the tokens of one forward pass."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.attention.heads import AttentionConfig
from model.positions.config import PositionConfig
from model.positions.log_n import query_scale
from model.positions.packing import PackedDocuments, document_of_tokens, pack_documents
from model.positions.rope import Region, RotaryCache, rotary_cache


@dataclass(frozen=True)
class TokenLayout:
    """Which tokens one forward pass is given."""

    batch: int
    """Sequences B."""
    sequence: int
    """Tokens S of each."""
    cu_seqlens: Tensor | None = None
    """int32 document boundaries over the B * S flattened tokens, row starts included; None = whole rows. On the CPU: index
    lists of unknown length are made from them, and the host would wait for a GPU to know it."""
    offset: int = 0
    """Index of the first token: tokens already in the cache."""
    starts_B: Tensor | None = None
    """Index of each row's first token behind its padding (decoding prompts of unequal length)."""


@dataclass(frozen=True)
class Positions:
    """Rotary caches and query scales of one forward pass: made once, used by every layer."""

    tokens: TokenLayout
    near: RotaryCache | None
    """Rotation of queries and keys (nearer than the window); None = no rotation."""
    windowed_near: RotaryCache | None
    """The same for windowed layers: that of `near`, unless they have a base of their own."""
    far_query: RotaryCache | None = None
    far_key: RotaryCache | None = None
    """None with a window = far keys stay unrotated (ReRoPE)."""
    window: int | None = None
    """Distance (tokens) from which the far rotation holds; None = one region."""
    query_scale: Tensor | None = None
    """Scale of the queries of full layers, [1 or B, S]: log n and YaRN's."""
    windowed_query_scale: Tensor | None = None
    """The same for windowed layers: YaRN's alone, since the number of tokens they see does not grow."""
    unrotated_query_scale: Tensor | None = None
    """The same for full layers of layers_without_positions: log n alone."""
    documents: PackedDocuments | None = None

    @property
    def has_far_pairs(self) -> bool:
        """Whether any pair is far: a sequence within the window has exactly the rotations of RoPE."""
        return self.window is not None and self.tokens.offset + self.tokens.sequence > self.window


def make_positions(
    position: PositionConfig,
    model: AttentionConfig,
    tokens: TokenLayout,
    trained_length: int,
    device: torch.device | str,
    dtype: torch.dtype,
) -> Positions:
    """Positions of a batch under a map.

    Args:
        position: the map.
        model: gives the number of rotated channels.
        trained_length: tokens, for log n and YaRN, unless the position says otherwise.
        dtype: of the network; a float64 one gets float64 caches.
    """
    trained_length, device = position.trained_length or trained_length, torch.device(device)
    capacity = 1 << max(tokens.offset + tokens.sequence - 1, 1).bit_length()
    double, far = dtype == torch.float64, position.map.far_region()

    def rotary(region: Region, key: Any = position) -> RotaryCache:  # frozen, so it can be hashed
        cache = rotary_cache(key, model.rotary_size, trained_length, capacity, region, str(device), double)
        return cache.narrow(tokens.offset, tokens.sequence)

    documents = None
    if tokens.cu_seqlens is not None:  # the kernels of the CPU go through the documents and need no lists
        documents = pack_documents(tokens.cu_seqlens, far.window if far else None, lists=device.type != "cpu").to(device)
    scales = _query_scales(position, tokens, documents, trained_length, device)
    scale_dtype, windowed = torch.float64 if double else torch.float32, position.of_windowed_layers
    return Positions(
        tokens,
        near=rotary("near") if position.map.rotates else None,
        windowed_near=rotary("near", windowed) if windowed.map.rotates else None,
        far_query=rotary("far-query") if far else None,
        far_key=rotary("far-key") if far and far.slope > 0 else None,
        window=far.window if far else None,
        documents=documents,
        **{name: None if scale is None else scale.to(scale_dtype) for name, scale in scales.items()},
    )


def _query_scales(
    position: PositionConfig, tokens: TokenLayout, documents: PackedDocuments | None, trained_length: int, device: torch.device
) -> dict[str, Tensor | None]:
    """The scales of Positions, float64 [1 or B, S]; None = 1."""
    if position.log_n == "none" and position.map.query_scale() == 1:
        return {}
    index = _index_in_document(tokens, documents, device)
    read = {
        "query_scale": position,
        "windowed_query_scale": position.of_windowed_layers.model_copy(update={"log_n": "none"}),
        "unrotated_query_scale": position.model_copy(update={"kind": "none"}),
    }
    return {name: query_scale(values, index, trained_length) for name, values in read.items()}


def _index_in_document(tokens: TokenLayout, documents: PackedDocuments | None, device: torch.device) -> Tensor:
    """Index of each token in its own document, [1 or B, S]."""
    if documents is not None:
        flat = torch.arange(tokens.batch * tokens.sequence, device=device)
        document = document_of_tokens(documents.boundaries, len(flat))
        return (flat - documents.boundaries.long()[document]).view(tokens.batch, tokens.sequence)
    index = torch.arange(tokens.offset, tokens.offset + tokens.sequence, device=device)[None]
    return index if tokens.starts_B is None else (index - tokens.starts_B[:, None]).clamp(min=0)
