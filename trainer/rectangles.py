"""What a rank holds of a tensor, as rectangles of the full tensor: the geometry under every checkpoint."""

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

PART_NUMBERS = 1 << 18
"""Least numbers a replica writes of a tensor that several ranks hold: smaller ones are written by one of them."""


@dataclass
class Shard:
    """A flat piece of one tensor, as an engine holds it.

    Attributes:
        name: "weight/model.norm.weight", "momentum/...", "second_moment/...".
        shape: Of the full logical tensor.
        slice_shape: Of this tensor-parallel rank's slice of it.
        slice_start: Where that slice begins in the full tensor.
        offset: Of values[0] in the flattened (row-major) slice.
        values: Flat 1-D view of live storage, any device; loading writes into it.
        replica: (index, count): `count` ranks hold these same values and share the writing.
        steady: The values change in updates only, so that a copy may be taken beside the next step's backwards.
    """

    name: str
    shape: tuple[int, ...]
    slice_shape: tuple[int, ...]
    slice_start: tuple[int, ...]
    offset: int
    values: torch.Tensor
    replica: tuple[int, int] = (0, 1)
    steady: bool = False


@dataclass(frozen=True)
class Box:
    """A rectangle of a full tensor: its first corner and its size along every dimension."""

    start: tuple[int, ...]
    extent: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Numbers inside."""
        return math.prod(self.extent)

    def __str__(self) -> str:
        """As one would index it: [0:32,8:16]."""
        return "[" + ",".join(f"{first}:{first + size}" for first, size in zip(self.start, self.extent)) + "]"

    def meet(self, other: "Box") -> "Box | None":
        """The rectangle inside both, or None."""
        start = tuple(map(max, self.start, other.start))
        ends = (min(a + n, b + m) for a, n, b, m in zip(self.start, self.extent, other.start, other.extent))
        extent = tuple(end - first for first, end in zip(start, ends))
        return None if any(size <= 0 for size in extent) else Box(start, extent)

    def view(self, inner: "Box", values: torch.Tensor) -> torch.Tensor:
        """The part `inner` of `values`, which holds this box (flat, row-major)."""
        places = tuple(slice(b - a, b - a + n) for a, b, n in zip(self.start, inner.start, inner.extent))
        return values.view(self.extent)[places]

    def rows(self, most_numbers: int) -> Iterator["Box"]:
        """Cut along the first dimension into boxes of at most `most_numbers` (at least one row each)."""
        if not self.extent:
            yield self
            return
        step = max(1, most_numbers // max(1, math.prod(self.extent[1:])))
        for row in range(0, self.extent[0], step):
            size = min(step, self.extent[0] - row)
            yield Box((self.start[0] + row, *self.start[1:]), (size, *self.extent[1:]))


def cut(offset: int, count: int, shape: tuple[int, ...]) -> Iterator[Box]:
    """The numbers [offset, offset + count) of a row-major tensor of `shape` as boxes, in their order.

    A matrix gives at most three: the rest of a first row, whole rows, the beginning of a last row.
    """
    if len(shape) < 2:
        if count:
            yield Box((offset,), (count,)) if shape else Box((), ())
        return
    row_numbers = math.prod(shape[1:])
    place, end = offset, offset + count
    while place < end:
        row, column = divmod(place, row_numbers)
        if column == 0 and end - place >= row_numbers:
            rows = (end - place) // row_numbers
            yield Box((row, *(0 for _ in shape[1:])), (rows, *shape[1:]))
            place += rows * row_numbers
        else:
            numbers = min(row_numbers - column, end - place)
            for inner in cut(column, numbers, shape[1:]):
                yield Box((row, *inner.start), (1, *inner.extent))
            place += numbers


def pieces(shard: Shard) -> Iterator[tuple[Box, torch.Tensor]]:
    """A shard as (box of the full tensor, flat view of its values)."""
    done = 0
    for box in cut(shard.offset, shard.values.numel(), shard.slice_shape):
        start = tuple(a + b for a, b in zip(shard.slice_start, box.start))
        yield replace(box, start=start), shard.values[done : done + box.numel]
        done += box.numel


def own(shard: Shard) -> Shard | None:
    """The part of a shard this rank writes: replicas divide a large one and take turns with small ones."""
    index, count = shard.replica
    numbers = shard.values.numel()
    parts = max(1, min(count, -(-numbers // PART_NUMBERS)))
    part = (index - zlib.crc32(shard.name.encode())) % count
    first, last = (numbers * part // parts, numbers * (part + 1) // parts) if part < parts else (0, 0)
    if first == last:
        return None
    return replace(shard, offset=shard.offset + first, values=shard.values[first:last], replica=(0, 1))


def check(shard: Shard) -> None:
    """Raise ValueError for a shard that contradicts itself: an engine's mistake, found before anything is written."""
    inside = all(a >= 0 and a + n <= full for a, n, full in zip(shard.slice_start, shard.slice_shape, shard.shape))
    ranks = {len(shard.shape), len(shard.slice_shape), len(shard.slice_start)}
    fits = shard.offset >= 0 and shard.offset + shard.values.numel() <= math.prod(shard.slice_shape)
    if len(ranks) > 1 or not inside or not fits or shard.values.dim() != 1 or not shard.values.is_contiguous():
        raise ValueError(
            f"shard {shard.name} does not fit: tensor {shard.shape}, slice {shard.slice_shape} at {shard.slice_start}, "
            f"{tuple(shard.values.shape)} values from {shard.offset}; wanted a flat view inside the slice inside the tensor"
        )
