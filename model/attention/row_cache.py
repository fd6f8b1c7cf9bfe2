"""Rows that pass through the network in chunks: what is kept of earlier chunks, and the attention of a chunk over all of it.

A row of a million tokens has activations of its latest chunk only. Of the tokens before it every layer keeps what its keys and
values are made of, not yet rotated (Attention.project); each chunk rotates and expands them again, a chunk's worth at a time:

    GQA               keys and values, 2 * kv heads * head_dim elements per token
    MLA               the latent and the shared key, kv_lora_rank + qk_rope_head_dim elements per token
    sliding window    the same of the last `sliding_window - 1` tokens only
    two regions       the same of every token, and of the last `window - 1` tokens once more

Queries of a chunk meet the chunk itself and the tokens within the layer's window before it in one call of the kernels of
training; all keys before those lie in one region for all of them, and are met without a mask, one earlier chunk after the
other. The parts are merged by their log-sum-exp. Context-parallel ranks divide the earlier chunks among themselves and do
everything else alike.

There are no gradients. Decoding has a cache of its own (model/attention/kv_cache.py), whose keys are rotated once.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model.attention.heads import AttentionConfig
from model.attention.kernels.merge import merge
from model.attention.kernels.unmasked import attend_unmasked
from model.attention.sliding_window import LayerPositions
from model.parallel.context import WHOLE_SEQUENCES, ContextParallel
from model.positions.batch import Positions, TokenLayout, make_positions
from model.positions.config import PositionConfig
from model.positions.packing import PackedDocuments, documents_between, pack_documents


@dataclass(frozen=True)
class KeySources:
    """What the keys and values of consecutive tokens are made of."""

    start: int
    """Index of the first token in its row."""
    parts: Sequence[Tensor]
    """[B, tokens, heads, size] each, in the order of Attention.project."""

    @property
    def tokens(self) -> int:
        """How many."""
        return self.parts[0].shape[1]

    def before(self, end: int) -> "KeySources":
        """Those of the tokens before `end`, views; maybe none."""
        return KeySources(self.start, [x[:, : max(0, end - self.start)] for x in self.parts])

    def last(self, tokens: int) -> "KeySources":
        """Copies of those of the last so many tokens, or of all."""
        first = max(0, self.tokens - tokens)
        return KeySources(self.start + first, [x[:, first:].clone() for x in self.parts])

    def followed_by(self, later: "KeySources") -> "KeySources":
        """These and those of the tokens after them."""
        return KeySources(self.start, [torch.cat(pair, dim=1) for pair in zip(self.parts, later.parts, strict=True)])


@dataclass(frozen=True)
class LayerReach:
    """How far back a layer looks."""

    recent: int
    """Tokens before a chunk that its queries meet in the same call as the chunk: those that are near to some of them."""
    sees_all: bool
    """Whether it sees the tokens before those, all in one region."""

    @classmethod
    def of(cls, layer: LayerPositions, position: PositionConfig, length: int) -> "LayerReach":
        """That of a layer in rows of `length` tokens."""
        if layer.sliding_window is not None and layer.sliding_window < length:
            return cls(layer.sliding_window - 1, False)
        far = position.map.far_region() if layer.takes_far_region else None
        return cls(far.window - 1 if far is not None and far.window < length else 0, True)

    def cached_tokens(self, length: int, chunk: int, ranks: int = 1) -> int:
        """Tokens of a row of `length` that a rank keeps at most: of all chunks but the last."""
        chunks = -(-length // chunk) - 1
        return min(self.recent, length) + (min(-(-chunks // ranks) * chunk, length) if self.sees_all else 0)


def cached_tokens(
    config: AttentionConfig, position: PositionConfig, length: int, chunk: int, ranks: int = 1
) -> list[int]:  # fmt: skip
    """Tokens that each layer keeps on a rank of a row of `length` in chunks, at most."""
    layers = (LayerPositions(config, layer) for layer in range(config.num_hidden_layers))
    return [LayerReach.of(layer, position, length).cached_tokens(length, chunk, ranks) for layer in layers]


class RowCache:
    """What all layers keep of the rows of a batch.

    Args:
        config: the network's sizes.
        position: the map to evaluate with.
        trained_length: tokens the network was trained at.
        rows: the whole rows, with the boundaries of their documents.
        context: the ranks that divide the earlier chunks among themselves. They are given the same chunks.
    """

    def __init__(
        self,
        config: AttentionConfig,
        position: PositionConfig,
        trained_length: int,
        rows: TokenLayout,
        context: ContextParallel = WHOLE_SEQUENCES,
    ):
        self.config, self.position, self.trained_length = config, position, trained_length
        self.rows, self.context = rows, context
        self.chunk = (0, 0)
        """First and past-the-last token of the latest chunk."""
        layers = (LayerPositions(config, layer) for layer in range(config.num_hidden_layers))
        self.layers = [LayerRowCache(LayerReach.of(layer, position, rows.sequence), self) for layer in layers]
        self.continued: list[tuple[int, int]] = []
        """By row: the first token of the document that the latest chunk begins in, and how many tokens it has in the chunk."""
        self.packed: dict[tuple[int, int | None], PackedDocuments] = {}

    def positions(self, B: int, S: int, device: torch.device, dtype: torch.dtype) -> Positions:
        """Positions of the next S tokens of every row, which become the latest chunk.

        Raises:
            ValueError: another batch size, or more tokens than the rows have left.
        """
        start, rows = self.chunk[1], self.rows
        if rows.batch != B or start + S > rows.sequence:
            raise ValueError(
                f"a chunk of {B} rows of {S} tokens cannot follow {start} tokens of {rows.batch} rows of {rows.sequence}; "
                "cut the rows that the cache was made for"
            )
        self.chunk = (start, start + S)
        self.packed.clear()
        self.continued = [] if rows.cu_seqlens is None else _continued_documents(rows, *self.chunk)
        layout = replace(rows, chunks=(self.chunk,))
        return make_positions(self.position, self.config, layout, self.trained_length, device, dtype)

    def documents(self, first: int, window: int | None, device: torch.device) -> PackedDocuments | None:
        """Documents of the tokens from `first` to the end of the latest chunk, whose queries are the chunk's."""
        rows, (start, end) = self.rows, self.chunk
        if rows.cu_seqlens is None:
            return None
        if (first, window) not in self.packed:  # most layers ask for the same
            boundaries = documents_between(rows.cu_seqlens, rows.sequence, first, end)
            lengths = {} if first == start else {"keys": end - first, "queries": end - start}
            self.packed[first, window] = pack_documents(boundaries, window, device.type != "cpu", **lengths).to(device)
        return self.packed[first, window]

    def visible(self, start: int, tokens: int) -> Iterator[tuple[slice, slice, slice]]:
        """Of `tokens` tokens from `start` on, all before the latest chunk: rows, queries of the chunk, and tokens that all of
        those queries see."""
        if not tokens:
            return
        if self.rows.cu_seqlens is None:
            yield slice(None), slice(None), slice(None)
        for row, (first, queries) in enumerate(self.continued):
            if first < start + tokens:
                yield slice(row, row + 1), slice(0, queries), slice(max(0, first - start), None)


def _continued_documents(rows: TokenLayout, start: int, end: int) -> list[tuple[int, int]]:
    """RowCache.continued of the chunk [start, end)."""
    assert rows.cu_seqlens is not None
    boundaries, found = rows.cu_seqlens.long().cpu(), []
    for row in range(rows.batch):
        place = row * rows.sequence + start
        after = int(torch.searchsorted(boundaries, place, right=True))
        document_end = int(boundaries[after]) - row * rows.sequence
        found.append((int(boundaries[after - 1]) - row * rows.sequence, min(document_end, end) - start))
    return found


class LayerRowCache:
    """What one layer keeps of the rows of a batch."""

    def __init__(self, reach: LayerReach, cache: RowCache):
        self.reach, self.cache = reach, cache
        self.chunks: list[KeySources] = []
        """Earlier chunks; an empty one in the place of each that another rank has."""
        self.tail: KeySources | None = None
        """The last `reach.recent` tokens before the latest chunk, on every rank."""

    def with_recent(self, parts: Sequence[Tensor]) -> KeySources:
        """The latest chunk, given by its `parts`, with the recent tokens before it."""
        chunk = KeySources(self.cache.chunk[0], parts)
        return chunk if self.tail is None else self.tail.followed_by(chunk)

    def earlier(self) -> Iterator[KeySources]:
        """This rank's tokens before the recent ones, one chunk after the other; all ranks get as many, some of them empty: a
        weight that expands them may be gathered from all ranks."""
        size, rank = self.cache.context.size, self.cache.context.rank
        end = self.cache.chunk[0] if self.tail is None else self.tail.start
        for first in range(0, len(self.chunks), size):
            own = self.chunks[first + rank] if first + rank < len(self.chunks) else self.chunks[0].before(0)
            yield own.before(end)

    def keep(self, parts: Sequence[Tensor]) -> None:
        """The latest chunk, given by its `parts`, becomes an earlier one; the last of the rows is nobody's past."""
        if self.cache.chunk[1] == self.cache.rows.sequence:
            return
        chunk, context = KeySources(self.cache.chunk[0], [x.contiguous() for x in parts]), self.cache.context
        if self.reach.recent:
            known = chunk if self.tail is None else self.tail.followed_by(chunk)
            self.tail = known.last(self.reach.recent)
        if self.reach.sees_all:
            own = len(self.chunks) % context.size == context.rank
            self.chunks.append(chunk if own else chunk.last(0))

    def elements(self) -> int:
        """Elements kept."""
        kept = [*self.chunks, *([] if self.tail is None else [self.tail])]
        return sum(x.numel() for sources in kept for x in sources.parts)


class MergedAttention:
    """Attention of a chunk over some keys, to which others are added.

    Args:
        out, lse: that over the recent keys, [B, C, n, Hv] and [B, C, n], alike on all context-parallel ranks.
        cache: which earlier tokens the chunk sees.
        scale: multiplies the scores.
    """

    def __init__(self, out: Tensor, lse: Tensor, cache: RowCache, scale: float):
        self.dtype, self.cache, self.scale = out.dtype, cache, scale
        self.out, self.lse = out.to(lse.dtype, copy=True), lse - math.log(cache.context.size)  # one share for each rank

    def add(self, q: Tensor, k: Tensor, v: Tensor, start: int) -> None:
        """Add the earlier tokens from `start` on: k [B, tokens, k, H] and v [B, tokens, k, Hv]; q [B, C, n, H] is rotated for
        them."""
        for rows, queries, keys in self.cache.visible(start, v.shape[1]):
            found = attend_unmasked(q[rows, queries], k[rows, keys], v[rows, keys], self.scale)
            merge(self.out[rows, queries], self.lse[rows, queries], *found)

    def result(self) -> Tensor:
        """[B, C, n, Hv], over the keys of all ranks."""
        context = self.cache.context
        out = self.out if context.size == 1 else context.merge_attention(self.out, self.lse)
        return out.to(self.dtype)
