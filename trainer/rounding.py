"""Stochastic rounding of float32 to bfloat16 with a counter for a generator.

A number is rounded up with the probability of its distance from below, so the mean is exact and small steps are not
lost. The bits of an element depend on (seed, step, tensor, row, column in the full tensor) and on nothing else: not on
the layout, nor on the order of work, and a resumed run draws what the unbroken one drew.
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
class Key:
    """Two 32-bit words that stand for (seed, step, tensor, purpose)."""

    row: int
    column: int


def key(seed: int, *counter: int | str) -> Key:
    """The key of a seed and of whatever tells one draw from another."""
    digest = hashlib.blake2b(repr((seed, *counter)).encode(), digest_size=8).digest()
    return Key(*struct.unpack("<II", digest))


@dataclass(frozen=True)
class Place:
    """Where a slice begins in its full tensor, and its size."""

    row: int
    column: int
    rows: int
    columns: int


@dataclass(frozen=True)
class Draw:
    """The random bits of one tensor slice for one key.

    They are the high half of a_r h_c + b_r mod 2^32, a_r odd: multiply-shift hashing, whose values are pairwise
    independent over the keys, on columns that are mixed well first. One product and one sum per element is all it costs.
    """

    a: Tensor
    b: Tensor
    """int32 [rows, 1]."""
    h: Tensor
    """int32 [columns]."""

    def noise(self, row: int, column: int, rows: int, columns: int) -> Tensor:
        """Integers in [0, 65536) of a rectangle of the slice, int32."""
        a, b = self.a[row : row + rows], self.b[row : row + rows]
        return (self.h[column : column + columns] * a).add_(b).bitwise_right_shift_(16).bitwise_and_(0xFFFF)

    def round_(self, target: Tensor, source: Tensor, row: int, column: int) -> None:
        """Write a float32 rectangle into a bfloat16 one, rounded stochastically.

        Args:
            target: bfloat16, rows x columns; written.
            source: float32 of that shape; its bits are destroyed.
            row, column: where the rectangle begins in the slice.
        """
        bits = source.view(torch.int32)
        bits.add_(self.noise(row, column, *source.shape))
        bits.bitwise_and_(-65536)  # what is left is a bfloat16 number, exactly
        target.copy_(source)


class Draws:
    """The draws of many slices at once: a few launches for all of them, however many there are.

    Args:
        places: of the slices.
        compiled: mix the words in one compiled pass.
    """

    def __init__(self, places: Sequence[Place], device: torch.device, compiled: bool = False):
        self._places, self._device = places, device
        self._mix: Callable[..., tuple[Tensor, Tensor, Tensor]] = _compiled_words() if compiled else _words
        self._columns = _counted([(place.column, place.columns) for place in places], device)
        self._rows = _counted([(place.row, place.rows) for place in places], device)
        self._sizes = [(aligned(place.rows), aligned(place.columns)) for place in places]

    def of(self, keys: Sequence[Key]) -> list[Draw]:
        """One for each slice, from one key for each."""
        pinned = self._device.type == "cuda"
        sent = torch.tensor([(key.row, key.column) for key in keys], dtype=torch.int64, pin_memory=pinned)
        h, a, b = self._mix(*self._columns, *self._rows, sent.to(self._device, non_blocking=True))
        rows, columns = zip(*self._sizes, strict=True)
        parts = zip(self._places, a[:, None].split(rows), b[:, None].split(rows), h.split(columns), strict=True)
        return [Draw(a[: place.rows], b[: place.rows], h[: place.columns]) for place, a, b, h in parts]


def draw(key: Key, place: Place, device: torch.device) -> Draw:
    """The draw of one slice."""
    return Draws([place], device).of([key])[0]


def aligned(count: int) -> int:
    """Elements of 4 bytes that a part of a tensor takes so that the next one begins at 16 bytes, as compiled kernels ask."""
    return -(-count // 4) * 4


def _counted(runs: list[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Numbers start to start + count of every run, and the run that each belongs to; int32."""
    numbers = torch.cat([torch.arange(start, start + aligned(count), dtype=torch.int32) for start, count in runs])
    counts = torch.tensor([aligned(count) for _, count in runs])
    return numbers.to(device), torch.repeat_interleave(torch.arange(len(runs), dtype=torch.int32), counts).to(device)


def _words(columns: Tensor, of_column: Tensor, rows: Tensor, of_row: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """h, a and b of all slices, int32, from the 32-bit words of their keys [slices, 2]."""
    row_key, column_key = (keys[:, index].index_select(0, of_row) for index in (0, 1))
    h = _mixed(columns.long() ^ keys[:, 1].index_select(0, of_column))
    r = rows.long()
    a, b = _mixed(r ^ row_key), _mixed((r * 0x9E3779B1 + column_key) ^ row_key)
    return h.to(torch.int32), a.to(torch.int32) | 1, b.to(torch.int32)


@cache
def _compiled_words() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    return torch.compile(_words, dynamic=True, fullgraph=True)


def rounded(source: Tensor, a: Tensor, b: Tensor, h: Tensor) -> Tensor:
    """What Draw.round_ writes for a whole slice, as a function for the compiler: bfloat16 from float32 [rows, columns]."""
    noise = (h * a + b >> 16) & 0xFFFF
    return (source.view(torch.int32) + noise & -65536).view(torch.float32).to(torch.bfloat16)


def _mixed(x: Tensor) -> Tensor:
    """Murmur3's finaliser on 32-bit words held in int64."""
    x = x & MASK
    x = (x ^ (x >> 16)) * 0x85EBCA6B & MASK
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & MASK
    return x ^ (x >> 16)
