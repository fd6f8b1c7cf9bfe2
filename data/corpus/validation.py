"""Held-out text for one data-parallel rank: which target tokens are scored, and the rows that score them.

Each corpus is cut into windows, taken in a fixed order that depends on the corpus and the length of a window only, until the
budget is used up; the last window may be scored in part. Neither the run's seed nor its batch, ranks or layout choose the
text, and no target token is scored twice.

At the training length L a window is a row of L tokens. At a context of c tokens a row scores at most c // 2 targets, the last
ones of c tokens, so every scored token has between c - c // 2 + 1 and c tokens to read, the same tokens are scored at every
context. Windows are those of the training length there too, but for contexts of more than CONTEXT_WINDOWS of them, whose
windows are longer: N scored tokens read at most about CONTEXT_WINDOWS * N tokens, however long the context is.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from data.config import DataConfig
from data.corpus.mixture import whole_shares
from data.corpus.order import permute, round_keys
from data.corpus.stream import NOT_SCORED, Batch, check_tokenizers, document_bounds, mixture_of, open_corpora, refuse_twice

CONTEXT_WINDOWS = 8
"""Windows of scored tokens in the longest context, at most."""
ORDER_BLOCK = 4096
"""Windows whose position in the order is computed at once."""


@dataclass(frozen=True)
class Row:
    """`first` is the position in the corpus of the row's first target; targets [start, stop) are scored."""

    corpus: int
    first: int
    start: int
    stop: int


class Validation:
    """The scored tokens of `data.validation`, at the training length and at longer or shorter contexts."""

    def __init__(
        self,
        config: DataConfig,
        sequence_length: int,
        micro_batch_size: int,
        contexts: list[int] | None = None,
        tokens: int = 0,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        """Open the corpora and choose the tokens.

        A mixture shares the budget by its weights; where a corpus has fewer tokens than its share, the budget shrinks
        until the shares hold. A budget of 0 scores all tokens of all corpora, whatever their weights.

        Args:
            sequence_length: tokens of a row of `whole`.
            micro_batch_size: rows that a rank passes through the network at once, at that length.
            contexts: lengths (tokens) at which `at` will be asked; each passes `check_contexts`.
            tokens: targets to score over all ranks; 0 = all.
            rank, ranks: which data-parallel rank this is.

        Raises:
            ValueError, FileNotFoundError: no corpus, foreign shards, or a context that cannot be scored.
        """
        assert 0 <= rank < ranks
        mixture = mixture_of(config, "validation")
        refuse_twice(mixture)
        self.config, self.sequence_length, self.micro_batch_size = config, sequence_length, micro_batch_size
        self.rank, self.ranks, self.asked = rank, ranks, tokens
        self.longest = max(contexts or [0])
        self.corpora = open_corpora([source.path for source in mixture])
        self.tokenizer_fingerprint = check_tokenizers(config, self.corpora)
        self._refuse_short_corpora()
        weights, sizes = [source.weight for source in mixture], [corpus.tokens for corpus in self.corpora]
        self._shares = budget_shares(sizes, weights, tokens)
        self._context_shares = budget_shares([size - self._before for size in sizes], weights, tokens)

    def _refuse_short_corpora(self) -> None:
        for corpus in self.corpora:
            if corpus.tokens < self.longest:
                raise ValueError(
                    f"a context of {self.longest:,} tokens is longer than the text at '{corpus.directory}', which has "
                    f"{corpus.tokens:,}; ask for shorter contexts or prepare more validation text"
                )

    @property
    def tokens(self) -> int:
        """Targets that `whole` scores, over all ranks."""
        return sum(self._shares)

    @property
    def context_tokens(self) -> int:
        """Targets that `at` scores at each context, over all ranks."""
        return sum(self._context_shares)

    @property
    def _before(self) -> int:
        """Tokens at the beginning of a corpus that have too few before them for the longest context."""
        return self.longest - self.longest // 2

    def whole(self) -> Iterator[Batch]:
        """Micro-batches of the training shape; every rank gets as many. Targets of rows that fill up are not scored."""
        yield from self._batches(self._windows(self._shares, self.sequence_length), self.sequence_length)

    def at(self, context: int) -> Iterator[Batch]:
        """Micro-batches of `context` tokens per row and no more tokens than one of the training shape (at least one row)."""
        yield from self._batches(self._context_rows(context), context)

    def rows_at(self, context: int) -> int:
        """Rows of `context` tokens that score anything, over all ranks."""
        return sum(1 for _ in self._context_rows(context))

    def batches(self, context: int | None = None) -> int:
        """Micro-batches that `at` gives every rank, or `whole` without a context."""
        length = context or self.sequence_length
        rows = self.rows_at(context) if context else sum(1 for _ in self._windows(self._shares, length))
        return -(-rows // (self._rows_in_batch(length) * self.ranks))

    def remarks(self) -> list[str]:
        """What is not as asked for, in sentences: a text shorter than the budget."""
        found = []
        if self.tokens < self.asked:
            found.append(f"the validation text allows {self.tokens:,} of {self.asked:,} tokens: each is scored once")
        if self.longest and self.context_tokens < min(self.asked, self.tokens):
            found.append(
                f"{self.context_tokens:,} tokens of the validation text have enough before them for a context of "
                f"{self.longest:,}: each is scored once at every context"
            )
        return found

    def _windows(self, shares: list[int], length: int, before: int = 0) -> Iterator[Row]:
        """Windows of each corpus in their order, without the first `before` tokens of a corpus, up to its share."""
        for corpus, left in enumerate(shares):
            order = self._order(corpus, length)
            while left > 0:
                first = next(order)
                start = max(first, before)
                stop = min(first + length, self.corpora[corpus].tokens, start + left)
                if stop > start:
                    yield Row(corpus, first, start, stop)
                    left -= stop - start

    def _order(self, corpus: int, length: int) -> Iterator[int]:
        source = self.corpora[corpus]
        windows, keys = -(-source.tokens // length), round_keys("validation", source.manifest.fingerprint)
        for block in range(0, windows, ORDER_BLOCK):
            places = np.arange(block, min(block + ORDER_BLOCK, windows), dtype=np.int64)
            yield from (permute(places, windows, keys) * length).tolist()

    def _context_rows(self, context: int) -> Iterator[Row]:
        """Each window's scored targets, at most context // 2 in a row, which ends with them unless the corpus begins there."""
        assert 2 <= context <= self.longest
        length = max(self.sequence_length, self.longest // CONTEXT_WINDOWS)
        for window in self._windows(self._context_shares, length, self._before):
            for start in range(window.start, window.stop, context // 2):
                stop = min(start + context // 2, window.stop)
                yield Row(window.corpus, max(0, stop - context), start, stop)

    def _rows_in_batch(self, length: int) -> int:
        return max(1, self.micro_batch_size * self.sequence_length // length)

    def _batches(self, rows: Iterator[Row], length: int) -> Iterator[Batch]:
        count = self._rows_in_batch(length)
        while group := list(islice(rows, count * self.ranks)):
            yield self._batch(group[self.rank * count : (self.rank + 1) * count], count, length)

    def _batch(self, rows: list[Row], count: int, length: int) -> Batch:
        end_of_text = self.corpora[0].manifest.end_of_text
        filler = 1 if end_of_text == 0 else 0  # not the separator: each would be a document of its own
        tokens_BS1 = np.full((count, length + 1), filler, dtype=np.int64)
        targets_BS = np.full((count, length), NOT_SCORED, dtype=np.int64)
        for b, row in enumerate(rows):
            if row.first == 0:
                tokens_BS1[b, 0] = end_of_text
            source, before = self.corpora[row.corpus], row.first - 1
            begin, end = max(before, 0), min(row.first + length, source.tokens)
            tokens_BS1[b, begin - before : end - before] = source.read(begin, end)
            scored = slice(row.start - row.first, row.stop - row.first)
            targets_BS[b, scored] = tokens_BS1[b, 1:][scored]
        inputs_BS = np.ascontiguousarray(tokens_BS1[:, :-1])
        bounds = torch.from_numpy(document_bounds(inputs_BS, end_of_text)) if self.config.document_mask else None
        return Batch(torch.from_numpy(inputs_BS), torch.from_numpy(targets_BS), bounds)

    def close(self) -> None:
        """Close all files."""
        for corpus in self.corpora:
            corpus.close()


def check_contexts(contexts: list[int], where: str) -> None:
    """Context lengths that can be scored, whatever the text; `where` names the option that they come from.

    Raises:
        ValueError: one is below 2 tokens or given twice.
    """
    for context in contexts:
        if context < 2:
            raise ValueError(f"{where}: a context of {context} must have at least 2 tokens, half of which are scored")
        if contexts.count(context) > 1:
            raise ValueError(f"{where}: the context {context} is given twice; leave one out")


def budget_shares(sizes: list[int], weights: list[float], tokens: int) -> list[int]:
    """Targets of each corpus: `tokens` shared in the proportion of the weights, less where one has too few; 0 = all."""
    if not tokens:
        return sizes
    shares = whole_shares(weights)
    total = sum(shares)
    tokens = min(tokens, *(size * total // share for size, share in zip(sizes, shares)))
    found = [tokens * share // total for share in shares]
    by_rest = sorted(range(len(shares)), key=lambda j: -(tokens * shares[j] % total))
    for j in by_rest[: tokens - sum(found)]:
        found[j] += 1
    return found
