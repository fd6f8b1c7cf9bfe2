"""Positions of the tokens of one forward pass."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.attention.heads import AttentionConfig
from model.positions.config import PositionConfig
from model.positions.log_n import query_scale
from model.positions.packing import PackedDocuments, copy_to, document_of_tokens, documents_before, pack_documents
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
    chunks: tuple[tuple[int, int], ...] = ()
    """First and past-the-last token of each chunk whose queries this rank computes (context parallel, with gathered keys);
    none = all tokens of the row in one."""


@dataclass(frozen=True)
class Chunk:
    """Consecutive queries of every row, which see the keys from the row's first token to the chunk's last."""

    start: int
    end: int
    """Past the last token."""
    documents: PackedDocuments | None
    """Of the tokens [0, end) of every row."""


@dataclass(frozen=True)
class Positions:
    """Rotary caches and query scales of one forward pass: made once, used by every layer."""

    tokens: TokenLayout
    near_query: RotaryCache | None
    """Rotation of queries (nearer than the window); None = no rotation. Caches and scales of queries have a row for each query
    that this rank computes, those of keys one for each token."""
    near_key: RotaryCache | None
    windowed_near_query: RotaryCache | None
    """The same for windowed layers: that of `near_query`, unless they have a base of their own."""
    windowed_near_key: RotaryCache | None
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
    chunks: tuple[Chunk, ...] = ()
    """Parts of the row that attention computes one by one."""

    @property
    def documents(self) -> PackedDocuments | None:
        """Those of whole rows."""
        return self.chunks[-1].documents

    def mark_dynamic(self) -> None:
        """Tell torch.compile that the numbers of documents vary."""
        for chunk in self.chunks:
            if chunk.documents is not None:
                chunk.documents.mark_dynamic()

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
    window = far.window if far else None

    def keys(region: Region, key: Any = position) -> RotaryCache:  # frozen, so it can be hashed
        cache = rotary_cache(key, model.rotary_size, trained_length, capacity, region, str(device), double)
        return cache.narrow(tokens.offset, tokens.sequence)

    def queries(region: Region, key: Any = position) -> RotaryCache:
        return keys(region, key).select(tokens.chunks) if tokens.chunks else keys(region, key)

    wide, windowed = torch.float64 if double else torch.float32, position.of_windowed_layers
    scales = _query_scales(position, tokens, trained_length, device)
    return Positions(
        tokens,
        *((queries("near"), keys("near")) if position.map.rotates else (None, None)),
        *((queries("near", windowed), keys("near", windowed)) if windowed.map.rotates else (None, None)),
        far_query=queries("far-query") if far else None,
        far_key=keys("far-key") if far and far.slope > 0 else None,
        window=window,
        chunks=tuple(_chunks(tokens, window, device)),
        **{name: None if scale is None else scale.to(wide) for name, scale in scales.items()},
    )


def _chunks(tokens: TokenLayout, window: int | None, device: torch.device) -> Iterator[Chunk]:
    """The parts of every row, with the documents that each sees."""
    length = tokens.sequence
    for start, end in tokens.chunks or ((0, length),):
        if tokens.cu_seqlens is None:
            yield Chunk(start, end, None)
            continue
        boundaries = tokens.cu_seqlens if end == length else documents_before(tokens.cu_seqlens, length, end)
        rows = {} if end - start == length else {"keys": end, "queries": end - start}
        # the kernels of the CPU go through the documents and need no lists
        yield Chunk(start, end, pack_documents(boundaries, window, device.type != "cpu", **rows).to(device))


def _query_scales(
    position: PositionConfig, tokens: TokenLayout, trained_length: int, device: torch.device
) -> dict[str, Tensor | None]:
    """The scales of Positions, float64 [1 or B, queries]; None = 1."""
    if position.log_n == "none" and position.map.query_scale() == 1:
        return {}
    index = _index_in_document(tokens, device)
    if tokens.chunks:
        index = torch.cat([index[:, start:end] for start, end in tokens.chunks], dim=1)
    read = {
        "query_scale": position,
        "windowed_query_scale": position.of_windowed_layers.model_copy(update={"log_n": "none"}),
        "unrotated_query_scale": position.model_copy(update={"kind": "none"}),
    }
    return {name: query_scale(values, index, trained_length) for name, values in read.items()}


def _index_in_document(tokens: TokenLayout, device: torch.device) -> Tensor:
    """Index of each token in its own document, [1 or B, S]."""
    if tokens.cu_seqlens is not None:
        boundaries = copy_to(device, tokens.cu_seqlens)
        flat = torch.arange(tokens.batch * tokens.sequence, device=device)
        document = document_of_tokens(boundaries, len(flat))
        return (flat - boundaries.long()[document]).view(tokens.batch, tokens.sequence)
    index = torch.arange(tokens.offset, tokens.offset + tokens.sequence, device=device)[None]
    return index if tokens.starts_B is None else (index - tokens.starts_B[:, None]).clamp(min=0)
