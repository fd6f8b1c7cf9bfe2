"""Stochastic rounding of float32 to bfloat16 with a counter for a generator.

A number is rounded up with the probability of its distance from below, so the mean is exact and small steps are not
lost. The bits of an element depend on (seed, step, tensor, row, column in the full tensor) and on nothing else: not on
the layout, nor on the order of work, and a resumed run draws what the unbroken one drew.
"""

import hashlib
import struct
from dataclasses import dataclass

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


class Draw:
    """The random bits of one tensor slice for one key.

    They are the high half of a_r h_c + b_r mod 2^32, a_r odd: multiply-shift hashing, whose values are pairwise
    independent over the keys, on columns that are mixed well first. One product and one sum a number is all it costs.

    Args:
        row, column: where the slice begins in the full tensor.
        rows, columns: its size.
    """

    def __init__(self, key: Key, row: int, column: int, rows: int, columns: int, device: torch.device):
        r = torch.arange(row, row + rows, device=device)
        c = torch.arange(column, column + columns, device=device)
        # Mixed together: the numbers are few, so that each operation is mostly its call.
        mixed = _mix_(torch.cat((c ^ key.column, r ^ key.row, r * 0x9E3779B1 + key.column ^ key.row))).to(torch.int32)
        self.h = mixed[:columns]
        self.a, self.b = mixed[columns:].view(2, rows, 1).unbind()
        self.a.bitwise_or_(1)

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


def rounded(source: Tensor, a: Tensor, b: Tensor, h: Tensor) -> Tensor:
    """What Draw.round_ writes for a whole slice, as a function for the compiler: bfloat16 from float32 [rows, columns]."""
    noise = (h * a + b >> 16) & 0xFFFF
    return (source.view(torch.int32) + noise & -65536).view(torch.float32).to(torch.bfloat16)


def _mix_(x: Tensor) -> Tensor:
    """Murmur3's finaliser on 32-bit words held in int64, in place."""
    x.bitwise_and_(MASK)
    x.bitwise_xor_(x >> 16).mul_(0x85EBCA6B).bitwise_and_(MASK)
    x.bitwise_xor_(x >> 13).mul_(0xC2B2AE35).bitwise_and_(MASK)
    return x.bitwise_xor_(x >> 16)
