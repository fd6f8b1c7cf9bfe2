"""How many sequences each batch has and how long they are: one number, or a ramp of them. Pure in the number of the batch:
how many updates there were before it, and more where rewinds left batches behind."""

from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class Ramp:
    """A whole number that goes with each batch: by itself, tokens of a row."""

    last: int
    """Of every batch after the ramp."""
    ramp: tuple[tuple[int, int], ...] = ()
    """(until, number): that of the batches before number `until`, in order."""

    def of(self, batch: int) -> int:
        """The number of a batch."""
        return next((number for until, number in self.ramp if batch < until), self.last)

    @property
    def each(self) -> list[int]:
        """The numbers in the order of the run."""
        return [*(number for _, number in self.ramp), self.last]

    def until(self, batch: int) -> Self:
        """Those of the batches before this one alone, and of every later one what the last of them has."""
        return self._of_pieces([piece for piece in self._pieces() if piece[0] < max(batch, 1)])

    def words(self) -> str:
        """ "8 until batch 100, then 16"."""
        return "".join(f"{number:,} until batch {until:,}, then " for until, number in self.ramp) + f"{self.last:,}"

    def _pieces(self) -> list[tuple[int, int]]:
        """(first batch, number) of each stretch."""
        firsts = [0, *(until for until, _ in self.ramp)]
        return list(zip(firsts, self.each))

    @classmethod
    def _of_pieces(cls, pieces: list[tuple[int, int]]) -> Self:
        """The numbers of stretches in order, neighbours of the same number joined."""
        joined = [piece for index, piece in enumerate(pieces) if index == 0 or piece[1] != pieces[index - 1][1]]
        firsts = [first for first, _ in joined[1:]]
        return cls(joined[-1][1], tuple((until, number) for until, (_, number) in zip(firsts, joined)))


@dataclass(frozen=True)
class BatchSizes(Ramp):
    """Sequences of each global batch."""

    def before(self, batch: int) -> int:
        """Sequences of all batches before this one, so also the number of its first sample."""
        total = start = 0
        for until, size in self.ramp:
            stop = min(until, batch)
            total += max(0, stop - start) * size
            start = max(start, stop)
        return total + max(0, batch - start) * self.last

    def from_batch(self, batch: int) -> "BatchSizes":
        """Those of the batches from this one on, which is batch 0 of what is returned."""
        return BatchSizes(self.last, tuple((until - batch, size) for until, size in self.ramp if until > batch))

    def ramp_contradicts(self, done: "BatchSizes", batch: int) -> bool:
        """Whether this ramp, as far as it goes, says something else of the batches before `batch` than what was done."""
        known = min(batch, self.ramp[-1][0]) if self.ramp else 0
        return known > 0 and self.until(known) != done.until(known)

    def continued(self, batch: int, now: "BatchSizes") -> "BatchSizes":
        """These sizes before a batch, and those of `now` from it on; `now` itself where that is the same."""
        past = [piece for piece in self._pieces() if piece[0] < batch]
        future = [piece for piece in now._pieces() if piece[0] > batch]
        found = self._of_pieces([*past, (batch, now.of(batch)), *future])
        return now if found == self._of_pieces(now._pieces()) else found
