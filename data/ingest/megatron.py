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
    tokens = np.memmap(prefix + ".bin", dtype, "r") if Path(prefix + ".bin").stat().st_size else np.empty(0, dtype)
    if fault := _index_fault(lengths, pointers, bounds, tokens):
        raise ValueError(f"'{prefix}.idx' {fault}: copy both files again")
    ends = np.concatenate([[0], np.cumsum(lengths)])
    return MegatronFile(tokens, pointers[bounds[:-1]] // dtype.itemsize, ends[bounds[1:]] - ends[bounds[:-1]])


def _index_fault(lengths: np.ndarray, pointers: np.ndarray, bounds: np.ndarray, tokens: np.ndarray) -> str:
    """What in an index cannot be true of its `.bin`, or "". Sequences follow one another, and so do documents."""
    width = tokens.dtype.itemsize
    if (lengths < 0).any():
        return "has a sequence of negative length"
    if (pointers > tokens.nbytes - width * lengths).any():
        return f"needs a .bin of more than the {tokens.nbytes} bytes there are"
    if ((pointers < 0) | (pointers % width != 0)).any():
        return "has a sequence that begins before its .bin, or inside a token"
    if (pointers[1:] != pointers[:-1] + width * lengths[:-1]).any():
        return "has sequences that do not follow one another"
    if len(bounds) and (bounds[0] < 0 or bounds[-1] > len(lengths) or (bounds[1:] < bounds[:-1]).any()):
        return f"has documents out of order, or beyond its {len(lengths)} sequences"
    return ""


def import_megatron(
    prefix: str, tokenizer_directory: str, output: str, validation_fraction: float = 0.005, shard_tokens: int = 64 << 20
) -> dict[str, CorpusManifest]:
    """Write a Megatron dataset as `output/train` and `output/validation`, each document with one separator at its end.

    A shard is written when it has `shard_tokens`. Returns the manifest of each split.
    Raises FileNotFoundError, or ValueError for damaged files, tokens outside the vocabulary, or an output that is not empty.
    """
    tokenizer, source = Tokenizer.load(tokenizer_directory), open_megatron(prefix)
    dtype = token_dtype(tokenizer.vocab_size)
    if storage.exists(output) and storage.list_files(output, empty_ok=True):
        raise ValueError(f"'{output}' is not empty: choose another --output")
    splits = ("train", "validation") if validation_fraction else ("train",)
    shards: dict[str, list[ShardInfo]] = {split: [] for split in splits}
    drafts = {split: ShardDraft(dtype) for split in splits}

    def flush(split: str) -> None:
        if drafts[split].lengths:
            name = f"shard-{len(shards[split]):06d}.arrow"
            shards[split].append(write_shard(storage.join_address(output, split, name), drafts[split]))
            drafts[split] = ShardDraft(dtype)

    try:
        for start, length in zip(source.starts.tolist(), source.lengths.tolist()):
            document = _document(source.tokens[start : start + length], tokenizer, prefix)
            digest = hashlib.blake2b(document.tobytes(), digest_size=8).digest()
            split = "validation" if int.from_bytes(digest, "little") / 2**64 < validation_fraction else "train"
            drafts[split].add(document, tokenizer.end_of_text)
            if len(drafts[split].tokens) >= shard_tokens:
                flush(split)
        for split in splits:
            flush(split)
        return {split: _sealed(tokenizer, dtype, shards[split], storage.join_address(output, split)) for split in splits}
    except BaseException:  # an import cannot be resumed, and its remains would make the next one refuse the output
        for split in splits:
            storage.remove(storage.join_address(output, split))
        raise


def _document(tokens: np.ndarray, tokenizer: Tokenizer, prefix: str) -> np.ndarray:
    """A document's tokens without the separator at its end. Raises ValueError for tokens outside the vocabulary."""
    least, largest = (int(tokens.min()), int(tokens.max())) if len(tokens) else (0, 0)
    if least < 0 or largest >= tokenizer.vocab_size:
        raise ValueError(
            f"'{prefix}' holds token {least if least < 0 else largest} where the tokenizer has {tokenizer.vocab_size} pieces:"
            " import the tokenizer that made the dataset"
        )
    return tokens[:-1] if len(tokens) and int(tokens[-1]) == tokenizer.end_of_text else tokens


def _sealed(tokenizer: Tokenizer, dtype: np.dtype, shards: list[ShardInfo], directory: str) -> CorpusManifest:
    counts = {"documents": sum(shard.documents for shard in shards), "part_tokens": sum(shard.tokens for shard in shards)}
    manifest = CorpusManifest(
        tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.end_of_text, dtype.name, shards, counts
    ).sealed()
    write_corpus_manifest(directory, manifest)
    return manifest
