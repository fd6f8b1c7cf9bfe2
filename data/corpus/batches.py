"""How many sequences each update has: one number, or a ramp of them. Pure in the number of the batch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchSizes:
    """Sequences of each global batch."""

    last: int
    """Of every batch after the ramp."""
    ramp: tuple[tuple[int, int], ...] = ()
    """(until, sequences): the size of the batches before number `until`, in order."""

    def of(self, batch: int) -> int:
        """Sequences of a batch."""
        return next((size for until, size in self.ramp if batch < until), self.last)

    def before(self, batch: int) -> int:
        """Sequences of all batches before this one, so also the number of its first sample."""
        total = start = 0
        for until, size in self.ramp:
            stop = min(until, batch)
            total += max(0, stop - start) * size
            start = max(start, stop)
        return total + max(0, batch - start) * self.last

    def continued(self, batch: int, now: "BatchSizes") -> "BatchSizes":
        """These sizes before a batch, and those of `now` from it on; `now` itself where that is the same."""
        past = [piece for piece in self._pieces() if piece[0] < batch]
        future = [piece for piece in now._pieces() if piece[0] > batch]
        found = _of_pieces([*past, (batch, now.of(batch)), *future])
        return now if found == _of_pieces(now._pieces()) else found

    def words(self) -> str:
        """ "8 until step 100, then 16"."""
        return "".join(f"{size:,} until step {until:,}, then " for until, size in self.ramp) + f"{self.last:,}"

    def _pieces(self) -> list[tuple[int, int]]:
        """(first batch, sequences) of each stretch."""
        firsts = [0, *(until for until, _ in self.ramp)]
        return list(zip(firsts, [*(size for _, size in self.ramp), self.last]))


def _of_pieces(pieces: list[tuple[int, int]]) -> BatchSizes:
    """The sizes of stretches in order, neighbours of the same size joined."""
    joined = [piece for index, piece in enumerate(pieces) if index == 0 or piece[1] != pieces[index - 1][1]]
    firsts = [first for first, _ in joined[1:]]
    return BatchSizes(joined[-1][1], tuple((until, size) for until, (_, size) in zip(firsts, joined)))
