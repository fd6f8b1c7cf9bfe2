"""Which source sample n comes from, and which of that source's samples it is.

Weights become whole numbers p_1..p_k with no common divisor; sources take turns in a period of M = sum(p) samples, arranged
so that after any n samples source j has been drawn n * p_j / M times, give or take less than one. Everything is a table of
M entries, so sample n takes one look-up. Weights whose period would pass 2**17 are rounded to that grid.
"""

import heapq
import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

LONGEST_PERIOD = 1 << 17


@dataclass(frozen=True)
class Mixture:
    """`source` [M]: who provides each sample of a period; `rank` [M]: how many of its samples came before in the period."""

    shares: tuple[int, ...]
    source: np.ndarray
    rank: np.ndarray

    @property
    def period(self) -> int:
        """Samples after which the sequence of sources repeats."""
        return len(self.source)

    def place(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, number of the sample within that source) of samples `index`; int64 arrays."""
        cycle, slot = np.divmod(np.asarray(index, dtype=np.int64), self.period)
        source = self.source[slot]
        return source.astype(np.int64), cycle * np.array(self.shares, dtype=np.int64)[source] + self.rank[slot]

    def drawn(self, count: int) -> np.ndarray:
        """Samples of each source among the first `count`; int64 [sources]."""
        cycle, slot = divmod(count, self.period)
        rest = np.bincount(self.source[:slot], minlength=len(self.shares))
        return cycle * np.array(self.shares, dtype=np.int64) + rest


def make_mixture(weights: list[float]) -> Mixture:
    """The mixture of positive weights, relative to each other."""
    shares = whole_shares(weights)
    source = _turns(shares)
    rank = np.zeros(len(source), dtype=np.int32)
    for j, share in enumerate(shares):
        rank[source == j] = np.arange(share, dtype=np.int32)
    return Mixture(tuple(shares), source, rank)


def whole_shares(weights: list[float]) -> list[int]:
    """Whole numbers in the proportion of the weights, as written in decimals; each at least 1."""
    exact = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    divisor = math.gcd(*whole)
    whole = [share // divisor for share in whole]
    if sum(whole) <= LONGEST_PERIOD:
        return whole
    total = sum(whole)
    floors = [max(1, share * LONGEST_PERIOD // total) for share in whole]
    by_rest = sorted(range(len(whole)), key=lambda j: -(whole[j] * LONGEST_PERIOD % total))
    for j in by_rest[: max(0, LONGEST_PERIOD - sum(floors))]:
        floors[j] += 1
    return floors


def _turns(shares: list[int]) -> np.ndarray:
    """Sources in turn: sample i of source j falls in [floor(i M / p), ceil((i + 1) M / p)), earliest deadline first.

    That window keeps every count exact to one sample at any point, and serving the earliest deadline among the
    samples whose window is open never misses one (it is optimal for unit tasks on one machine).
    """
    period = sum(shares)
    opening = [(0, j, 0) for j in range(len(shares))]
    heapq.heapify(opening)
    ready: list[tuple[int, int, int]] = []
    turns = np.empty(period, dtype=np.int32)
    for slot in range(period):
        while opening and opening[0][0] <= slot:
            _, j, i = heapq.heappop(opening)
            heapq.heappush(ready, (-(-(i + 1) * period // shares[j]), j, i))
        deadline, j, i = heapq.heappop(ready)
        assert deadline > slot
        turns[slot] = j
        if i + 1 < shares[j]:
            heapq.heappush(opening, ((i + 1) * period // shares[j], j, i + 1))
    return turns
