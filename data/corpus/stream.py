"""Batches for one data-parallel rank, as a pure function of the number of the batch.

Sample n of the run -> (source, number k within the source) by the mixture -> epoch k // size and window permute(k % size).
A window is S tokens of the source, and the token before the first: the targets of all windows of a source together are each of
its tokens once. They are consecutive tokens at a multiple of S, or whole documents (data/corpus/packing.py). The first token of
a source has the separator before it. What is left of a window is filled up with unscored separators: of the last one, or of any
that holds whole documents. Nothing else is padded, dropped or repeated, and no part of this knows how many ranks there are.

A batch of shorter rows has the same windows as any other, each cut into rows.
"""

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from data.config import DataConfig, SourceConfig
from data.corpus.batches import BatchSizes, Ramp
from data.corpus.mixture import Mixture, make_mixture
from data.corpus.order import permute, round_keys
from data.corpus.packing import Packing, pack_corpus
from data.corpus.plan import DataPlan, PlannedPhase, PlannedSource
from data.corpus.shards import Corpus
from data.tokenizer.tokenizer import Tokenizer

NOT_SCORED = -100


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one data-parallel rank."""

    inputs_BS: torch.Tensor
    targets_BS: torch.Tensor
    cu_seqlens: torch.Tensor | None = None  # int32, document boundaries over the B*S flattened tokens


@dataclass(frozen=True)
class TrainingPhase:
    """A stretch of samples with one mixture."""

    first_sample: int
    mixture: Mixture
    corpora: tuple[int, ...]  # index of each source of the mixture among the stream's corpora
    drawn_before: tuple[int, ...]  # samples each corpus of the stream gave to earlier phases


class Samples:
    """Sample n of a part, as tokens. Knows neither ranks nor batches; pure in n."""

    def __init__(
        self,
        phases: list[tuple[int, list[SourceConfig]]],
        sequence_length: int,
        seed: int,
        pack: Literal["stream", "documents"] = "stream",
    ) -> None:
        """`phases`: (first sample, sources) in order, the first from sample 0."""
        self.sequence_length, self.seed, self.pack = sequence_length, seed, pack
        paths = list(dict.fromkeys(source.path for _, sources in phases for source in sources))
        self.corpora = open_corpora(paths)
        self.packings: list[Packing | None] = [None] * len(self.corpora)
        if pack == "documents":
            self.packings = [pack_corpus(corpus.document_starts(), sequence_length) for corpus in self.corpora]
        self.sizes = [packing.rows if packing else self._windows(c) for c, packing in enumerate(self.packings)]
        self.phases: list[TrainingPhase] = []
        # the same corpus at two paths continues where it stopped, whatever the path
        index = {path: self._first_like(corpus) for path, corpus in zip(paths, self.corpora)}
        for first, sources in phases:
            refuse_twice(sources)
            corpora = tuple(index[source.path] for source in sources)
            if len({*corpora}) < len(corpora):
                named = ", ".join(source.path for source in sources)
                raise ValueError(
                    f"two corpora of a mixture hold the same tokens ({named}): name one of them, with both weights"
                )
            drawn = self.drawn(first)
            self.phases.append(TrainingPhase(first, make_mixture([source.weight for source in sources]), corpora, drawn))

    def _first_like(self, corpus: Corpus) -> int:
        """Index of the first corpus with these very tokens."""
        fingerprints = [other.manifest.fingerprint for other in self.corpora]
        return fingerprints.index(corpus.manifest.fingerprint)

    def drawn(self, until: int) -> tuple[int, ...]:
        """Samples of each corpus before sample `until`."""
        begun = [phase for phase in self.phases if phase.first_sample <= until]
        if not begun:
            return (0,) * len(self.corpora)
        phase = begun[-1]
        drawn = np.array(phase.drawn_before, dtype=np.int64)
        np.add.at(drawn, list(phase.corpora), phase.mixture.drawn(until - phase.first_sample))
        return tuple(int(count) for count in drawn)

    def place(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(corpus, epoch, window) of samples `index` (int64 [n] each)."""
        index = np.asarray(index, dtype=np.int64)
        corpus, number = np.empty_like(index), np.empty_like(index)
        firsts = [phase.first_sample for phase in self.phases]
        which = np.searchsorted(firsts, index, side="right") - 1
        for p in set(which.tolist()):
            phase, rows = self.phases[p], np.flatnonzero(which == p)
            source, within = phase.mixture.place(index[rows] - phase.first_sample)
            corpus[rows] = np.array(phase.corpora)[source]
            number[rows] = within + np.array(phase.drawn_before)[corpus[rows]]
        epoch, window = np.divmod(number, np.array(self.sizes)[corpus])
        for c in set(corpus.tolist()):
            for e in set(epoch[corpus == c].tolist()):
                rows = np.flatnonzero((corpus == c) & (epoch == e))
                keys = round_keys(self.seed, self.corpora[c].manifest.fingerprint, e)
                window[rows] = permute(window[rows], self.sizes[c], keys)
        return corpus, epoch, window

    def window(self, corpus: int, window: int) -> tuple[np.ndarray, int]:
        """S + 1 tokens of a window (int64), and how many of its S targets are tokens of the corpus."""
        S, source = self.sequence_length, self.corpora[corpus]
        tokens, at = np.full(S + 1, source.manifest.end_of_text, dtype=np.int64), 1
        for start, stop in self._pieces(corpus, window):
            before = int(at == 1 and start > 0)
            tokens[at - before : at + stop - start] = source.read(start - before, stop)
            at += stop - start
        return tokens, at - 1

    def covers(self, corpus: int) -> bool:
        """Whether the windows of a corpus hold each of its tokens once."""
        packing, tokens = self.packings[corpus], self.corpora[corpus].tokens
        if packing is not None:
            return packing.covers(tokens)
        return (self.sizes[corpus] - 1) * self.sequence_length < tokens <= self.sizes[corpus] * self.sequence_length

    def padding(self, corpus: int) -> float:
        """Share of the windows of a corpus that holds no token."""
        return 1 - self.corpora[corpus].tokens / (self.sizes[corpus] * self.sequence_length)

    def _windows(self, corpus: int) -> int:
        return -(-self.corpora[corpus].tokens // self.sequence_length)

    def _pieces(self, corpus: int, window: int) -> list[tuple[int, int]]:
        """(first token, past the last) of the consecutive tokens that a window holds."""
        if packing := self.packings[corpus]:
            return packing.pieces(window)
        start = window * self.sequence_length
        return [(start, min(start + self.sequence_length, self.corpora[corpus].tokens))]

    def close(self) -> None:
        """Close all files."""
        for corpus in self.corpora:
            corpus.close()


@dataclass(frozen=True)
class BatchShape:
    """The batch of one update over all ranks."""

    sequence_length: int
    """Tokens per row."""
    global_batch_size: int
    """Rows per update, after the ramp."""
    micro_batch_size: int
    """Rows that a rank passes through the network at once."""
    ramp: tuple[tuple[int, int], ...] = ()
    """(until, rows): the rows of the batches before number `until`, in order."""
    first_batch: int = 0
    """Number of the first batch that is still to be read: those before it had any size."""
    length_ramp: tuple[tuple[int, int], ...] = ()
    """(until, tokens): tokens of a row of the batches before number `until`, in order; each divides `sequence_length`. Such a
    batch has as many more rows as they are shorter."""

    @property
    def sizes(self) -> BatchSizes:
        """Rows of every update."""
        return BatchSizes(self.global_batch_size, self.ramp)

    @property
    def lengths(self) -> Ramp:
        """Tokens of a row of every update."""
        return Ramp(self.sequence_length, self.length_ramp)


class Stream:
    """The batches of one data-parallel rank of a part of the corpus, read ahead in the background."""

    def __init__(
        self,
        config: DataConfig,
        part: Literal["train", "validation"],
        shape: BatchShape,
        rank: int,
        ranks: int,
        seed: int,
        pin_memory: bool = False,
    ) -> None:
        """Open the part.

        Args:
            rank, ranks: which data-parallel rank this is.
            pin_memory: for a device that copies while it computes.

        Raises:
            ValueError, FileNotFoundError: sizes of batches to come that do not divide, missing shards, shards of another
                tokenizer.
        """
        for size in shape.sizes.from_batch(shape.first_batch).each:
            _check_sizes(size, shape.micro_batch_size, ranks)
        assert 0 <= rank < ranks
        self.config, self.shape, self.sizes = config, shape, shape.sizes
        self.rank, self.ranks, self.pin_memory = rank, ranks, pin_memory
        phases = training_phases(config, self.sizes) if part == "train" else [(0, mixture_of(config, part))]
        self.samples = Samples(phases, shape.sequence_length, seed, config.pack)
        self.tokenizer_fingerprint = check_tokenizers(config, self.samples.corpora)
        self.fingerprint = self._fingerprint()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="data") if config.prefetch_steps else None
        self._ahead: dict[int, Future[list[Batch]]] = {}

    def batches(self, batch: int) -> list[Batch]:
        """This rank's micro-batches of a global batch, in order. Pure in its number."""
        if self._executor is None:
            return self._read(batch)
        future = self._ahead.pop(batch, None)
        coming = range(batch + 1, batch + 1 + self.config.prefetch_steps)
        for other in [other for other in self._ahead if other not in coming]:
            self._ahead.pop(other).cancel()
        future = future or self._executor.submit(self._read, batch)
        for other in coming:
            if other not in self._ahead:
                self._ahead[other] = self._executor.submit(self._read, other)
        return future.result()

    def tokens(self, batch: int) -> int:
        """Target tokens of a global batch, over all ranks."""
        return self.sizes.of(batch) * self.shape.sequence_length

    def rows(self, batch: int) -> np.ndarray:
        """Numbers of the samples of a global batch that this rank reads, int64 [rows of the batch / ranks]."""
        share = self.sizes.of(batch) // self.ranks
        return self.sizes.before(batch) + self.rank * share + np.arange(share, dtype=np.int64)

    def epochs(self, batches: int) -> list[tuple[str, float]]:
        """(path, times) of each corpus: how many times over a run of so many batches reads it, 0.5 being half of it."""
        samples = self.samples
        drawn = samples.drawn(self.sizes.before(batches))
        return [(corpus.directory, n / size) for corpus, n, size in zip(samples.corpora, drawn, samples.sizes)]

    def _read(self, batch: int) -> list[Batch]:
        corpus, _, window = self.samples.place(self.rows(batch))
        S, B = self.samples.sequence_length, self.shape.micro_batch_size
        batches = []
        for first in range(0, len(corpus), B):
            tokens_BS1 = np.empty((B, S + 1), dtype=np.int64)
            targets_BS = np.full((B, S), NOT_SCORED, dtype=np.int64)
            for row in range(B):
                tokens_BS1[row], scored = self.samples.window(corpus[first + row], window[first + row])
                targets_BS[row, :scored] = tokens_BS1[row, 1 : scored + 1]
            length = self.shape.lengths.of(batch)
            batches.append(self._batch(tokens_BS1[:, :-1].reshape(-1, length), targets_BS.reshape(-1, length)))
        return batches

    def _batch(self, inputs_BS: np.ndarray, targets_BS: np.ndarray) -> Batch:
        inputs, targets = torch.from_numpy(np.ascontiguousarray(inputs_BS)), torch.from_numpy(targets_BS)
        bounds = None
        if self.config.document_mask:
            end_of_text, padding_BS = self.samples.corpora[0].manifest.end_of_text, targets_BS == NOT_SCORED
            bounds = torch.from_numpy(document_bounds(inputs_BS, end_of_text, padding_BS))
        if self.pin_memory:
            inputs, targets = inputs.pin_memory(), targets.pin_memory()
            bounds = None if bounds is None else bounds.pin_memory()
        return Batch(inputs, targets, bounds)

    def _fingerprint(self) -> str:
        samples = self.samples
        parts = [f"{samples.seed} {samples.sequence_length} {self.sizes.last} {self.tokenizer_fingerprint}"]
        parts += [f"{self.sizes.ramp}"] if self.sizes.ramp else []
        parts += [f"rows {self.shape.length_ramp}"] if self.shape.length_ramp else []
        parts += [f"pack {samples.pack}"] if samples.pack != "stream" else []
        for phase in samples.phases:
            sources = [samples.corpora[c].manifest.fingerprint for c in phase.corpora]
            parts.append(f"{phase.first_sample} {sources} {phase.mixture.shares}")
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def plan(self) -> DataPlan:
        """What decides which tokens each batch holds."""
        samples, starts = self.samples, sorted({0, *(phase.from_step for phase in self.config.curriculum)})
        phases = []
        for from_step, phase in zip(starts, samples.phases, strict=True):
            corpora = [samples.corpora[c] for c in phase.corpora]
            shares = zip(corpora, phase.mixture.shares)
            sources = (PlannedSource(corpus.manifest.fingerprint, share, corpus.directory) for corpus, share in shares)
            phases.append(PlannedPhase(from_step, tuple(sources)))
        return DataPlan(
            samples.seed, samples.sequence_length, self.tokenizer_fingerprint, self.sizes, tuple(phases), samples.pack,
            self.shape.length_ramp,
        )  # fmt: skip

    def close(self) -> None:
        """Stop reading ahead and close all files."""
        if self._executor:
            self._executor.shutdown(wait=True, cancel_futures=True)
        self.samples.close()


def document_bounds(inputs_BS: np.ndarray, end_of_text: int, padding_BS: np.ndarray | None = None) -> np.ndarray:
    """Document boundaries over the flattened inputs, int32 [documents + 1], from 0 to B*S.

    A document begins with the separator before it, which is what its first token is predicted from; every row begins one.

    Args:
        padding_BS: separators that fill up a row, of which each would be a document: together they are one.
    """
    starts_BS = inputs_BS == end_of_text
    if padding_BS is not None:
        starts_BS[:, 1:] &= ~(padding_BS[:, 1:] & padding_BS[:, :-1])
    starts_BS[:, 0] = True
    return np.append(np.flatnonzero(starts_BS.ravel()), starts_BS.size).astype(np.int32)


def training_phases(config: DataConfig, sizes: BatchSizes) -> list[tuple[int, list[SourceConfig]]]:
    """(first sample, mixture) of each stretch of a training run. Raises ValueError when there is none."""
    phases = [(0, mixture_of(config, "train"))]
    for phase in config.curriculum:
        first = sizes.before(phase.from_step)
        phases = [earlier for earlier in phases if earlier[0] < first] + [(first, phase.sources)]
    return phases


def mixture_of(config: DataConfig, part: Literal["train", "validation"]) -> list[SourceConfig]:
    """The corpora of a part and their weights. Raises ValueError when there is none."""
    found = config.sources(part)
    if not found:
        raise ValueError(f"data.{part} names no corpus: set it to the directory that `tiglon prepare` wrote")
    return found


def refuse_twice(sources: list[SourceConfig]) -> None:
    """Raises ValueError for a mixture that names a corpus twice."""
    if len({source.path for source in sources}) < len(sources):
        raise ValueError(f"a mixture names a corpus twice ({[source.path for source in sources]}): add its weights up")


def open_corpora(paths: list[str]) -> list[Corpus]:
    """Prepared parts, none of them empty. Raises ValueError or FileNotFoundError."""
    corpora = [Corpus(path) for path in paths]
    for corpus in corpora:
        if corpus.tokens == 0:
            raise ValueError(f"the corpus at '{corpus.directory}' holds no tokens: prepare more text for it")
    return corpora


def _check_sizes(global_batch_size: int, micro_batch_size: int, ranks: int) -> None:
    if global_batch_size % (micro_batch_size * ranks):
        raise ValueError(
            f"global_batch_size = {global_batch_size} is not a multiple of micro_batch_size = {micro_batch_size} times"
            f" {ranks} data-parallel rank{'s' if ranks > 1 else ''}: change one of them"
        )


def check_tokenizers(config: DataConfig, corpora: list[Corpus]) -> str:
    """The fingerprint all corpora and the configured tokenizer share."""
    first = corpora[0]
    wanted, owner = first.manifest.tokenizer, f"the shards at '{first.directory}'"
    if config.tokenizer:
        wanted, owner = Tokenizer.load(config.tokenizer).fingerprint, f"data.tokenizer = '{config.tokenizer}'"
    for corpus in corpora:
        if corpus.manifest.tokenizer != wanted:
            raise ValueError(
                f"the shards at '{corpus.directory}' were made with tokenizer {corpus.manifest.tokenizer[:12]}, but {owner}"
                f" is {wanted[:12]}: prepare them with the same tokenizer"
            )
    return wanted
