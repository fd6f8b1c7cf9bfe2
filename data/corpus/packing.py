"""Documents kept whole: which pieces of a corpus each row of S tokens holds.

A document, its separator included, is one piece if it fits into a row. A longer one is cut into pieces that are rows by
themselves, and a rest. Pieces shorter than a row are put together by best fit decreasing (Ding et al. 2024, Fewer Truncations
Improve Language Modeling, arXiv 2404.10830): from the longest to the shortest, each into the fullest row that has room for it.

Pieces of one length are alike, so they are placed many at a time: rows are kept in stretches of equal space, of which a piece
fills all but less than half before the next is used. That takes O(N log N) for the N lengths to be sorted, O(S log S) stretches
at most, and then nothing but tables of N numbers.
"""

from bisect import bisect_left, insort
from collections import defaultdict
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Packing:
    """The rows of a corpus. Keeps 12 bytes per piece and 8 per row."""

    size: int
    """Tokens S of a row."""
    starts: np.ndarray
    """First token of each piece in the corpus, in the order of the rows; int64."""
    lengths: np.ndarray
    """Tokens of each piece; int32."""
    firsts: np.ndarray
    """First piece of each row, and the number of pieces; int64 [rows + 1]."""
    cut: int
    """Documents longer than a row."""

    @property
    def rows(self) -> int:
        """Rows of an epoch."""
        return len(self.firsts) - 1

    def pieces(self, row: int) -> list[tuple[int, int]]:
        """(first token, past the last) of each piece of a row. All but the last end with a separator."""
        which = slice(int(self.firsts[row]), int(self.firsts[row + 1]))
        starts = self.starts[which].tolist()
        return [(start, start + length) for start, length in zip(starts, self.lengths[which].tolist())]

    def covers(self, tokens: int) -> bool:
        """Whether the rows hold each of the first `tokens` tokens once, none of them more than S."""
        order = np.argsort(self.starts)
        starts, ends = self.starts[order], (self.starts + self.lengths)[order]
        filled = np.add.reduceat(self.lengths, self.firsts[:-1], dtype=np.int64)
        return bool(starts[0] == 0 and ends[-1] == tokens and (starts[1:] == ends[:-1]).all() and filled.max() <= self.size)


def pack_corpus(bounds: np.ndarray, size: int) -> Packing:
    """Rows of `size` tokens from the first token of each document and the end of the last, int64 [documents + 1].

    Rows of one piece of `size` tokens come first. The pieces of any other row are in the order of the corpus.
    """
    lengths = np.diff(bounds)
    whole, rest = np.divmod(lengths, size)
    long = np.flatnonzero(whole)
    number = np.arange(int(whole.sum())) - np.repeat(np.cumsum(whole[long]) - whole[long], whole[long])
    cut_starts = np.repeat(bounds[long], whole[long]) + number * size
    short = np.flatnonzero(rest)
    row, rows = best_fit(rest[short], size)
    short = short[np.argsort(row, kind="stable")]
    counts = np.concatenate([np.ones(len(cut_starts), np.int64), np.bincount(row, minlength=rows)])
    return Packing(
        size,
        np.concatenate([cut_starts, bounds[short + 1] - rest[short]]),
        np.concatenate([np.full(len(cut_starts), size), rest[short]]).astype(np.int32),
        np.concatenate([[0], np.cumsum(counts)]),
        int((lengths > size).sum()),
    )


def best_fit(lengths: np.ndarray, size: int) -> tuple[np.ndarray, int]:
    """Best fit decreasing.

    Args:
        lengths: of the pieces, from 1 to `size`; of pieces of one length the first is placed first.

    Returns:
        The row of each piece, int64 [pieces], and the number of rows.
    """
    runs, rows = _runs(np.bincount(lengths), size)
    first, each, pieces = np.array(runs, dtype=np.int64).reshape(-1, 3).T
    placed = np.repeat(first, pieces)
    number = np.arange(len(lengths)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    placed += number // np.repeat(each, pieces)
    row = np.empty_like(placed)
    row[np.argsort(-lengths, kind="stable")] = placed
    return row, rows


def _runs(counts: np.ndarray, size: int) -> tuple[list[tuple[int, int, int]], int]:
    """How many pieces there are of each length -> (first row, pieces in each row, pieces) of runs of pieces of one length,
    longest first, which go into consecutive rows; and the number of rows."""
    stretches: dict[int, list[tuple[int, int]]] = defaultdict(list)  # space -> (first row, rows)
    spaces: list[int] = []  # those that there are, in order
    runs, rows = [], 0

    def leave(space: int, first: int, count: int) -> None:
        if space and count:
            if not stretches[space]:
                insort(spaces, space)
            stretches[space].append((first, count))

    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            tightest = bisect_left(spaces, length)
            if tightest == len(spaces):
                new = -(-left // (size // length))
                leave(size, rows, new)
                rows += new
            space = spaces[tightest]
            first, count = stretches[space].pop()
            if not stretches[space]:
                del spaces[tightest]
            each = space // length
            pieces = min(left, count * each)
            filled, more = divmod(pieces, each)
            runs.append((first, each, pieces))
            leave(space - each * length, first, filled)
            leave(space - more * length, first + filled, bool(more))
            leave(space, first + filled + bool(more), count - filled - bool(more))
            left -= pieces
    return runs, rows
