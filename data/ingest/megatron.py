"""Convert a Megatron dataset, a pair of `.bin` and `.idx` files of tokens, to shards.

The format is that of megatron.core.datasets.indexed_dataset: flat tokens in `.bin`; in `.idx` a header, the length and byte
offset of each sequence, and the first sequence of each document.
"""

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import storage
from data.corpus.shards import CorpusManifest, ShardDraft, ShardInfo, token_dtype, write_corpus_manifest, write_shard
from data.ingest.tasks import SPLITS, check_validation_fraction
from data.tokenizer.tokenizer import Tokenizer

MAGIC = b"MMIDIDX\x00\x00"
MEGATRON_TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # megatron.core.datasets.indexed_dataset.DType


@dataclass(frozen=True)
class MegatronFile:
    """Flat tokens and the documents in them."""

    tokens: np.ndarray  # memory map
    starts: np.ndarray  # int64 [documents], in tokens
    lengths: np.ndarray  # int64 [documents]


def open_megatron(prefix: str) -> MegatronFile:
    """Open `prefix.bin` and `prefix.idx`. Raises FileNotFoundError or ValueError."""
    prefix = prefix.removesuffix(".bin").removesuffix(".idx")
    for ending in (".idx", ".bin"):
        if not Path(prefix + ending).is_file():
            raise FileNotFoundError(f"no file '{prefix}{ending}': a Megatron dataset is a pair of .bin and .idx")
    index = Path(prefix + ".idx").read_bytes()
    if index[:9] != MAGIC or len(index) < 34 or index[17] not in MEGATRON_TYPES:
        raise ValueError(f"'{prefix}.idx' is not a Megatron index of whole-number tokens: check the file")
    dtype = np.dtype(MEGATRON_TYPES[index[17]])
    sequences, documents = struct.unpack("<QQ", index[18:34])
    if len(index) < 34 + 12 * sequences + 8 * documents:
        raise ValueError(f"'{prefix}.idx' is cut short: copy it again")
    lengths = np.frombuffer(index, "<i4", sequences, 34).astype(np.int64)
    pointers = np.frombuffer(index, "<i8", sequences, 34 + 4 * sequences)
    bounds = np.frombuffer(index, "<i8", documents, 34 + 12 * sequences)
    size = Path(prefix + ".bin").stat().st_size
    if size % dtype.itemsize:
        raise ValueError(f"'{prefix}.bin' has {size} bytes, no multiple of the {dtype.itemsize} of a token: copy it again")
    tokens = np.memmap(prefix + ".bin", dtype, "r") if size else np.empty(0, dtype)
    if fault := _index_fault(lengths, pointers, bounds, tokens):
        raise ValueError(f"'{prefix}.idx' {fault}: copy both files again")
    ends = np.concatenate([[0], np.cumsum(lengths)])
    begins = np.concatenate([pointers // dtype.itemsize, [0]])  # a document without sequences may begin behind the last one
    return MegatronFile(tokens, begins[bounds[:-1]], ends[bounds[1:]] - ends[bounds[:-1]])


def _index_fault(lengths: np.ndarray, pointers: np.ndarray, bounds: np.ndarray, tokens: np.ndarray) -> str:
    """What in an index cannot be true of its `.bin`, or "". Sequences follow one another and are all of it; so do documents, of
    the sequences."""
    width = tokens.dtype.itemsize
    if (lengths < 0).any():
        return "has a sequence of negative length"
    if (pointers > tokens.nbytes - width * lengths).any():
        return f"needs a .bin of more than the {tokens.nbytes} bytes there are"
    if ((pointers < 0) | (pointers % width != 0)).any():
        return "has a sequence that begins before its .bin, or inside a token"
    if (pointers[1:] != pointers[:-1] + width * lengths[:-1]).any():
        return "has sequences that do not follow one another"
    if (used := width * int(lengths.sum())) != tokens.nbytes:  # they follow one another, so the rest is before or behind them
        return f"has sequences for {used} of the {tokens.nbytes} bytes of its .bin"
    if len(bounds) and (bounds[0] < 0 or bounds[-1] > len(lengths) or (bounds[1:] < bounds[:-1]).any()):
        return f"has documents out of order, or beyond its {len(lengths)} sequences"
    if (covered := int(bounds[-1] - bounds[0]) if len(bounds) else 0) != len(lengths):
        return f"has documents for {covered} of its {len(lengths)} sequences"
    return ""


def import_megatron(
    prefix: str, tokenizer_directory: str, output: str, validation_fraction: float = 0.005, shard_tokens: int = 64 << 20
) -> dict[str, CorpusManifest]:
    """Write a Megatron dataset as `output/train` and `output/validation`, each document with one separator at its end.

    Documents without tokens (but for a separator) are left out and counted in the manifests.

    A shard is written when it has `shard_tokens`. Returns the manifest of each split.
    Raises FileNotFoundError, or ValueError for a wrong share, damaged files, files that do not belong together, tokens outside
    the vocabulary, or an output that is not empty.
    """
    check_validation_fraction(validation_fraction)
    tokenizer, source = Tokenizer.load(tokenizer_directory), open_megatron(prefix)
    splits = SPLITS if validation_fraction else SPLITS[:1]
    writers = {split: _Split(storage.join_address(output, split), tokenizer, shard_tokens) for split in splits}
    with storage.only_writer(output, "--output"):
        if storage.list_files(output, empty_ok=True):
            raise ValueError(f"'{output}' is not empty: choose another --output")
        return _write(source, prefix, tokenizer, writers, validation_fraction)


def _write(
    source: MegatronFile, prefix: str, tokenizer: Tokenizer, writers: "dict[str, _Split]", validation_fraction: float
) -> dict[str, CorpusManifest]:
    """The manifests of the splits, or on any error nothing."""
    empty = 0
    try:
        for start, length in zip(source.starts.tolist(), source.lengths.tolist()):
            document = _document(source.tokens[start : start + length], tokenizer, prefix)
            if not len(document):
                empty += 1
                continue
            digest = hashlib.blake2b(document.tobytes(), digest_size=8).digest()
            split = "validation" if int.from_bytes(digest, "little") / 2**64 < validation_fraction else "train"
            writers[split].add(document)
        for writer in writers.values():
            writer.flush()
        if not any(writer.shards for writer in writers.values()):
            raise ValueError(f"'{prefix}' holds no document with tokens ({empty} empty ones): check the dataset")
        return {split: writer.finish({"empty": empty} if empty else {}) for split, writer in writers.items()}
    except BaseException:  # an import cannot be resumed, and its remains would make the next one refuse the output
        for writer in writers.values():
            storage.remove(writer.directory)
        raise


class _Split:
    """The shards of one split, each written when it has `shard_tokens`."""

    def __init__(self, directory: str, tokenizer: Tokenizer, shard_tokens: int) -> None:
        self.directory, self.tokenizer, self.shard_tokens = directory, tokenizer, shard_tokens
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.shards: list[ShardInfo] = []
        self.draft = ShardDraft(self.dtype)

    def add(self, document: np.ndarray) -> None:
        """Put a document behind the others."""
        self.draft.add(document, self.tokenizer.end_of_text)
        if len(self.draft.tokens) >= self.shard_tokens:
            self.flush()

    def flush(self) -> None:
        """Write what there is as a shard."""
        if self.draft.lengths:
            name = f"shard-{len(self.shards):06d}.arrow"
            self.shards.append(write_shard(storage.join_address(self.directory, name), self.draft))
            self.draft = ShardDraft(self.dtype)

    def finish(self, left_out: dict[str, int]) -> CorpusManifest:
        """Write the manifest of the shards."""
        counts = {
            "documents": sum(shard.documents for shard in self.shards),
            "left_out": left_out,
            "part_tokens": sum(shard.tokens for shard in self.shards),
        }
        manifest = CorpusManifest(
            self.tokenizer.fingerprint,
            self.tokenizer.vocab_size,
            self.tokenizer.end_of_text,
            self.dtype.name,
            self.shards,
            counts,
        ).sealed()
        write_corpus_manifest(self.directory, manifest)
        return manifest


def _document(tokens: np.ndarray, tokenizer: Tokenizer, prefix: str) -> np.ndarray:
    """A document's tokens without the separator at its end. Raises ValueError for tokens outside the vocabulary."""
    least, largest = (int(tokens.min()), int(tokens.max())) if len(tokens) else (0, 0)
    if least < 0 or largest >= tokenizer.vocab_size:
        raise ValueError(
            f"'{prefix}' holds token {least if least < 0 else largest} where the tokenizer has {tokenizer.vocab_size} pieces:"
            " import the tokenizer that made the dataset"
        )
    return tokens[:-1] if len(tokens) and int(tokens[-1]) == tokenizer.end_of_text else tokens
