"""What a rank holds of a tensor, as rectangles of the full tensor: the geometry under every checkpoint."""

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch

MIN_PART_ELEMENTS = 1 << 18
"""Fewest elements that a replica writes of a tensor that several ranks hold: smaller ones are written by one of them."""
StepPart = Literal["accumulate", "update"]
"""The two parts of a step, in their order: forwards and backwards, then the update."""


@dataclass
class Shard:
    """A flat slice of one tensor, as an engine holds it.

    Attributes:
        name: "weight/model.norm.weight", "momentum/...", "second_moment/...".
        shape: Of the full logical tensor.
        slice_shape: Of this tensor-parallel rank's slice of it.
        slice_start: Where that slice begins in the full tensor.
        offset: Of values[0] in the flattened (row-major) slice.
        values: Flat 1-D view of live storage, any device; loading writes into it.
        replica: (index, count): `count` ranks hold these same values and share the writing.
        changes_in: The first part of a step in which the values change. What changes in the update only may be copied beside
            the backwards.
        padding: Rows of zeros behind those of `shape` into which slices reach. A checkpoint has none of them, so a run with
            any number of them reads it.
    """

    name: str
    shape: tuple[int, ...]
    slice_shape: tuple[int, ...]
    slice_start: tuple[int, ...]
    offset: int
    values: torch.Tensor
    replica: tuple[int, int] = (0, 1)
    changes_in: StepPart = "accumulate"
    padding: int = 0


@dataclass(frozen=True)
class Rectangle:
    """A rectangle of a full tensor: its first corner and its size along every dimension."""

    start: tuple[int, ...]
    extent: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements inside."""
        return math.prod(self.extent)

    def __str__(self) -> str:
        """As one would index it: [0:32,8:16]."""
        return "[" + ",".join(f"{first}:{first + size}" for first, size in zip(self.start, self.extent)) + "]"

    def intersection(self, other: "Rectangle") -> "Rectangle | None":
        """The rectangle inside both, or None."""
        start = tuple(map(max, self.start, other.start))
        ends = (min(a + n, b + m) for a, n, b, m in zip(self.start, self.extent, other.start, other.extent))
        extent = tuple(end - first for first, end in zip(start, ends))
        return None if any(size <= 0 for size in extent) else Rectangle(start, extent)

    def view(self, inner: "Rectangle", values: torch.Tensor) -> torch.Tensor:
        """The part `inner` of `values`, which are the elements of this rectangle (flat, row-major)."""
        slices = tuple(slice(b - a, b - a + n) for a, b, n in zip(self.start, inner.start, inner.extent))
        return values.view(self.extent)[slices]

    def rows(self, max_elements: int) -> Iterator["Rectangle"]:
        """Cut along the first dimension into rectangles of at most `max_elements` (at least one row each)."""
        if not self.extent:
            yield self
            return
        step = max(1, max_elements // max(1, math.prod(self.extent[1:])))
        for row in range(0, self.extent[0], step):
            size = min(step, self.extent[0] - row)
            yield Rectangle((self.start[0] + row, *self.start[1:]), (size, *self.extent[1:]))


def flat_rectangles(offset: int, count: int, shape: tuple[int, ...]) -> Iterator[Rectangle]:
    """The elements [offset, offset + count) of a row-major tensor of `shape` as rectangles, in their order.

    A matrix gives at most three: the rest of a first row, whole rows, the beginning of a last row.
    """
    if len(shape) < 2:
        if count:
            yield Rectangle((offset,), (count,)) if shape else Rectangle((), ())
        return
    row_elements = math.prod(shape[1:])
    end = offset + count
    while offset < end:
        row, column = divmod(offset, row_elements)
        if column == 0 and end - offset >= row_elements:
            rows = (end - offset) // row_elements
            yield Rectangle((row, *(0 for _ in shape[1:])), (rows, *shape[1:]))
            offset += rows * row_elements
        else:
            elements = min(row_elements - column, end - offset)
            for inner in flat_rectangles(column, elements, shape[1:]):
                yield Rectangle((row, *inner.start), (1, *inner.extent))
            offset += elements


def shard_rectangles(shard: Shard) -> Iterator[tuple[Rectangle, torch.Tensor]]:
    """A shard as (rectangle of the full tensor, flat view of its values), without its padding."""
    first, full = 0, Rectangle((0,) * len(shard.shape), shard.shape)
    for rectangle in flat_rectangles(shard.offset, shard.values.numel(), shard.slice_shape):
        start = tuple(a + b for a, b in zip(shard.slice_start, rectangle.start))
        inside = replace(rectangle, start=start).intersection(full)
        if inside is not None:  # padding is rows behind all others, so what is inside comes first
            yield inside, shard.values[first : first + inside.numel]
        first += rectangle.numel


def share_to_write(shard: Shard) -> Shard | None:
    """The share of a shard this rank writes: replicas divide a large one; a small one is written by one of them."""
    index, count = shard.replica
    elements = shard.values.numel()
    parts = max(1, min(count, -(-elements // MIN_PART_ELEMENTS)))
    part = (index - zlib.crc32(shard.name.encode())) % count  # so that the small ones do not all fall to the same rank
    first, last = (elements * part // parts, elements * (part + 1) // parts) if part < parts else (0, 0)
    if first == last:
        return None
    return replace(shard, offset=shard.offset + first, values=shard.values[first:last], replica=(0, 1))


def check_shard(shard: Shard) -> None:
    """Raise ValueError for a shard that contradicts itself: an engine's mistake, found before anything is written."""
    held = (shard.shape[0] + shard.padding, *shard.shape[1:]) if shard.padding else shard.shape
    inside = all(a >= 0 and a + n <= full for a, n, full in zip(shard.slice_start, shard.slice_shape, held))
    ranks = {len(shard.shape), len(shard.slice_shape), len(shard.slice_start)}
    fits = shard.offset >= 0 and shard.offset + shard.values.numel() <= math.prod(shard.slice_shape)
    if len(ranks) > 1 or not inside or not fits or shard.values.dim() != 1 or not shard.values.is_contiguous():
        raise ValueError(
            f"shard {shard.name} does not fit: tensor {shard.shape}, slice {shard.slice_shape} at {shard.slice_start}, "
            f"{tuple(shard.values.shape)} values from {shard.offset}; wanted a flat view inside the slice inside the tensor"
        )
