"""Stochastic rounding of float32 to bfloat16 with a counter for a generator.

An element is rounded up with a probability equal to its distance from the value below, so the mean is exact and small steps are
not lost. Its random bits depend on (seed, step, tensor, row, column in the full tensor) and on nothing else: neither on the
layout nor on the order of work, and a resumed run draws the bits of the unbroken one.
"""

import hashlib
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

MASK = 0xFFFFFFFF


@dataclass(frozen=True)
class NoiseKey:
    """Two 32-bit words hashed from (seed, step, tensor, purpose); each of its two halves keys one dimension."""

    row: int
    column: int


def noise_key(seed: int, *counter: int | str) -> NoiseKey:
    """The key of a seed and of what tells one draw from another: step, tensor name, purpose."""
    digest = hashlib.blake2b(repr((seed, *counter)).encode(), digest_size=8).digest()
    return NoiseKey(*struct.unpack("<II", digest))


@dataclass(frozen=True)
class SliceBounds:
    """Where a slice begins in its full tensor, and its size, in rows and columns."""

    row: int
    column: int
    rows: int
    columns: int


@dataclass(frozen=True)
class SliceNoise:
    """The random bits of one tensor slice for one key.

    They are the high half of a_r h_c + b_r mod 2^32, a_r odd: multiply-shift hashing (Dietzfelbinger 1996), whose values are
    pairwise independent over the keys, of columns that were hashed themselves. The cost is one product and one sum per element.
    """

    a: Tensor
    b: Tensor
    """int32 [rows, 1]."""
    h: Tensor
    """int32 [columns]."""

    def bits(self) -> tuple[Tensor, Tensor, Tensor]:
        """a, b and h, for a compiled kernel."""
        return self.a, self.b, self.h

    def noise(self, row: int, column: int, rows: int, columns: int) -> Tensor:
        """Integers in [0, 65536) of a rectangle of the slice, int32."""
        a, b = self.a[row : row + rows], self.b[row : row + rows]
        return (self.h[column : column + columns] * a).add_(b).bitwise_right_shift_(16).bitwise_and_(0xFFFF)

    def round_(self, target: Tensor, source: Tensor, row: int, column: int) -> None:
        """Round a float32 rectangle into a bfloat16 one.

        Args:
            target: bfloat16, rows x columns; written.
            source: float32 of that shape; destroyed.
            row, column: where the rectangle begins in the slice.
        """
        bits = source.view(torch.int32)
        bits.add_(self.noise(row, column, *source.shape))
        bits.bitwise_and_(-65536)  # what is left is exactly a bfloat16 value
        target.copy_(source)


class NoiseGenerator:
    """Draws the noise of many slices at once, in a few launches however many there are.

    Args:
        compiled: hash in one compiled pass.
    """

    def __init__(self, slices: Sequence[SliceBounds], device: torch.device, compiled: bool = False):
        self._slices, self._device = slices, device
        self._hash: Callable[..., tuple[Tensor, Tensor, Tensor]] = _compiled_hash() if compiled else _hash_words
        self._columns = _indexes([(part.column, part.columns) for part in slices], device)
        self._rows = _indexes([(part.row, part.rows) for part in slices], device)
        self._sizes = [(aligned(part.rows), aligned(part.columns)) for part in slices]

    def draw(self, keys: Sequence[NoiseKey]) -> list[SliceNoise]:
        """The noise of every slice, each from its own key."""
        pinned = self._device.type == "cuda"
        sent = torch.tensor([(key.row, key.column) for key in keys], dtype=torch.int64, pin_memory=pinned)
        h, a, b = self._hash(*self._columns, *self._rows, sent.to(self._device, non_blocking=True))
        rows, columns = zip(*self._sizes, strict=True)
        parts = zip(self._slices, a[:, None].split(rows), b[:, None].split(rows), h.split(columns), strict=True)
        return [SliceNoise(a[: part.rows], b[: part.rows], h[: part.columns]) for part, a, b, h in parts]


def slice_noise(key: NoiseKey, bounds: SliceBounds, device: torch.device) -> SliceNoise:
    """The noise of a single slice."""
    return NoiseGenerator([bounds], device).draw([key])[0]


def aligned(count: int) -> int:
    """`count` 4-byte elements, padded so that what follows them is aligned to 16 bytes, as compiled kernels need."""
    return -(-count // 4) * 4


def _indexes(ranges: list[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Indexes start to start + aligned(count) of every range, and the range that each belongs to; int32."""
    indexes = torch.cat([torch.arange(start, start + aligned(count), dtype=torch.int32) for start, count in ranges])
    counts = torch.tensor([aligned(count) for _, count in ranges])
    return indexes.to(device), torch.repeat_interleave(torch.arange(len(ranges), dtype=torch.int32), counts).to(device)


def _hash_words(
    columns: Tensor, of_column: Tensor, rows: Tensor, of_row: Tensor, keys: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """h, a and b of all slices, int32, from the 32-bit words of their keys [slices, 2]."""
    row_key, column_key = (keys[:, index].index_select(0, of_row) for index in (0, 1))
    h = _murmur3_finalize(columns.long() ^ keys[:, 1].index_select(0, of_column))
    r = rows.long()
    a, b = _murmur3_finalize(r ^ row_key), _murmur3_finalize((r * 0x9E3779B1 + column_key) ^ row_key)
    return h.to(torch.int32), a.to(torch.int32) | 1, b.to(torch.int32)


@cache
def _compiled_hash() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    return torch.compile(_hash_words, dynamic=True, fullgraph=True)


def round_stochastically(source: Tensor, a: Tensor, b: Tensor, h: Tensor) -> Tensor:
    """SliceNoise.round_ of a whole slice as a function for the compiler: bfloat16 from float32 [rows, columns]."""
    noise = (h * a + b >> 16) & 0xFFFF
    return (source.view(torch.int32) + noise & -65536).view(torch.float32).to(torch.bfloat16)


def _murmur3_finalize(x: Tensor) -> Tensor:
    """MurmurHash3's finalizer on 32-bit words held in int64."""
    x = x & MASK
    x = (x ^ (x >> 16)) * 0x85EBCA6B & MASK
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & MASK
    return x ^ (x >> 16)
