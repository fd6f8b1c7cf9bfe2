"""Proof of what a corpus holds and of what a plan of training reads from it."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from data import storage
from data.config import DataConfig
from data.corpus.batches import BatchSizes
from data.corpus.shards import Corpus, CorpusManifest, ShardInfo
from data.corpus.stream import Samples, training_phases
from data.tokenizer.tokenizer import Tokenizer

CHUNK_SAMPLES = 1 << 18


@dataclass
class CorpusReport:
    """What a prepared part holds. `faults` is empty when it is whole."""

    directory: str
    manifest: CorpusManifest
    faults: list[str] = field(default_factory=list)
    lengths: Counter = field(default_factory=Counter)  # floor(log2(tokens of a document)) -> documents
    near_empty: int = 0
    over_long: int = 0
    longest: int = 0


def audit_corpus(directory: str, near_empty_tokens: int = 8, over_long_tokens: int = 1 << 20) -> CorpusReport:
    """Read every shard of a part: sizes, checksums, boundaries, token range, lengths of documents."""
    corpus = Corpus(directory)
    report = CorpusReport(directory, corpus.manifest)
    for info in corpus.manifest.shards:
        try:
            lengths = _audit_shard(directory, corpus.manifest, info)
        except (ValueError, OSError, pa.ArrowInvalid) as reason:
            report.faults.append(f"{info.file}: {reason}")
            continue
        report.lengths.update(_histogram(lengths))
        report.near_empty += int((lengths < near_empty_tokens).sum())
        report.over_long += int((lengths > over_long_tokens).sum())
        report.longest = max(report.longest, int(lengths.max()))
    if corpus.manifest.sealed().fingerprint != corpus.manifest.fingerprint:
        report.faults.append("the manifest's fingerprint is not that of its shards: prepare the corpus again")
    return report


def _histogram(lengths: np.ndarray) -> dict[int, int]:
    bins, counts = np.unique(np.log2(lengths).astype(int), return_counts=True)
    return dict(zip(bins.tolist(), counts.tolist()))


def _audit_shard(directory: str, manifest: CorpusManifest, info: ShardInfo) -> np.ndarray:
    """Lengths of a shard's documents (int64). Raises ValueError for anything that is not as the manifest says."""
    whole = storage.read_bytes(storage.join_address(directory, info.file))
    if hashlib.sha256(whole).hexdigest() != info.sha256:
        raise ValueError("its checksum is not the manifest's: restore the file or prepare the corpus again")
    column = _token_column(whole)
    offsets, tokens = np.asarray(column.offsets), column.values.to_numpy()
    if (len(tokens), len(column)) != (info.tokens, info.documents):
        raise ValueError(f"it holds {len(tokens)} tokens and {len(column)} documents, not {info.tokens} and {info.documents}")
    if not np.array_equal(tokens, np.frombuffer(whole, tokens.dtype, info.tokens, info.tokens_at)):
        raise ValueError("its tokens do not begin where the manifest says")
    if int(tokens.max()) >= manifest.vocab_size:
        raise ValueError(f"it holds token {int(tokens.max())}, but the vocabulary has {manifest.vocab_size}")
    if not np.all(tokens[offsets[1:] - 1] == manifest.end_of_text):
        raise ValueError("a document does not end with the separator")
    return np.diff(offsets)


def _token_column(whole: bytes) -> pa.LargeListArray:
    """The documents of a shard's file. Raises ValueError for another Arrow file, or documents outside the tokens."""
    file = pa.ipc.open_file(pa.py_buffer(whole))
    if file.num_record_batches != 1 or file.schema.names != ["tokens"] or not pa.types.is_large_list(file.schema.types[0]):
        raise ValueError("it is an Arrow file of something else than tokens")
    column = file.get_batch(0).column(0)
    column.validate(full=True)
    if column.null_count or column.values.null_count or column.type.value_type not in (pa.uint16(), pa.uint32()):
        raise ValueError("it holds something else than tokens")
    return column


@dataclass(frozen=True)
class PlanCoverage:
    """How often a plan scores the tokens of one corpus: every token `least` or `most` times, and `most` - `least` is 0 or 1."""

    directory: str
    tokens: int
    samples: int  # in an epoch
    drawn: int  # by the plan
    least: int
    most: int
    padding: float = 0.0  # share of the samples that holds no token

    @property
    def exact(self) -> bool:
        """Whether no token was left behind: none is seen twice before all are seen once, and so on."""
        return self.most - self.least <= 1 and self.least == self.drawn // self.samples


def audit_plan(
    config: DataConfig, sequence_length: int, sizes: BatchSizes, batches: int, seed: int
) -> tuple[list[PlanCoverage], np.ndarray]:
    """Walk through every sample of the first `batches` batches of a plan and count each window of each corpus.

    Returns the coverage per corpus, and the draws [100 stretches of as many batches, corpora] for a picture of the mixture.
    Costs two bytes of memory per sample of the corpora and about a second per million samples of the plan.
    """
    samples = Samples(training_phases(config, sizes), sequence_length, seed, config.pack)
    seen = [np.zeros(size, np.uint16) for size in samples.sizes]
    total = sizes.before(batches)
    draws, ends = np.zeros((100, len(samples.sizes)), np.int64), _stretches(sizes, batches)
    for index in _chunks(total):
        corpus, _, window = samples.place(index)
        stretch = np.searchsorted(ends, index, side="right")
        np.add.at(draws, (stretch, corpus), 1)
        for c in range(len(seen)):
            np.add.at(seen[c], window[corpus == c], 1)
    assert all(map(samples.covers, range(len(seen)))), "windows tile the corpus"
    samples.close()
    coverage = []
    for c, (corpus, counts) in enumerate(zip(samples.corpora, seen)):
        times = int(counts.sum()), int(counts.min()), int(counts.max())
        coverage.append(PlanCoverage(corpus.directory, corpus.tokens, samples.sizes[c], *times, samples.padding(c)))
    return coverage, draws


def _stretches(sizes: BatchSizes, batches: int) -> np.ndarray:
    """The first sample of each hundredth of the batches but the first, in samples and parts of one, float64 [99]."""
    whole, part = np.divmod(np.arange(1, 100) * batches / 100, 1)
    return np.array([sizes.before(int(n)) + rest * sizes.of(int(n)) for n, rest in zip(whole, part)])


def _chunks(total: int) -> Iterator[np.ndarray]:
    for first in range(0, total, CHUNK_SAMPLES):
        yield np.arange(first, min(first + CHUNK_SAMPLES, total), dtype=np.int64)


def decoded_samples(directory: str, tokenizer: Tokenizer, count: int, tokens: int = 60) -> list[str]:
    """Text at up to `count` positions spread evenly over a corpus, for a person to look at."""
    corpus = Corpus(directory)
    if corpus.manifest.tokenizer != tokenizer.fingerprint:
        raise ValueError(f"the shards at '{directory}' were made with another tokenizer: give the one they were prepared with")
    starts = sorted({corpus.tokens * i // count for i in range(count)}) if corpus.tokens else []
    return [tokenizer.decode(corpus.read(start, min(start + tokens, corpus.tokens))) for start in starts]
