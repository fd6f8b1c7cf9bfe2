"""What others made: sentencepiece and Hugging Face tokenizers, and Megatron's `.bin`/`.idx` token files."""

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import storage
from data.shards import Draft, Manifest, ShardInfo, token_dtype, write_manifest, write_shard
from data.tokenizer import FILES, Description, SentencePiece, Tokenizer, fingerprint, open_backend

MAGIC = b"MMIDIDX\x00\x00"
MEGATRON_TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # megatron.core.datasets.indexed_dataset.DType
SEPARATORS = ("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "[EOS]")
PROBES = (
    "",
    " a",
    "  a  b ",
    "\t\n\n x\r\n",
    "\x00\x7f",
    "你好😀é",
    "e\u0301 \u2581",
    "<s></s><|endoftext|>",
    "12345\u00a0\u2028",
)


def import_tokenizer(source: str, output: str, end_of_text: str = "") -> Tokenizer:
    """Copy a sentencepiece `.model` or a Hugging Face `tokenizer.json` (or a folder with one) into a tokenizer directory.

    Args:
        end_of_text: the piece that separates documents; default: what the tokenizer itself names, else a usual name.
    The result's `description.lossless` says whether it hands back spaces, control characters and rare letters as they were.
    Raises FileNotFoundError or ValueError.
    """
    path = Path(source)
    if path.is_dir():
        names = [path / name for name in FILES.values() if (path / name).exists()]
        if not names:
            raise FileNotFoundError(f"'{source}' holds neither {' nor '.join(FILES.values())}: give the tokenizer's file")
        path = names[-1]
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer file at '{source}'")
    storage.refuse_pointer(path)
    model, kind = path.read_bytes(), "huggingface" if path.suffix == ".json" else "sentencepiece"
    backend = open_backend(kind, model)
    separator = _separator(backend, path.parent / "tokenizer_config.json", end_of_text)
    description = Description(kind, "imported", fingerprint(model), backend.vocab_size, separator, False)
    tokenizer = Tokenizer(model, description)
    lossless = all(tokenizer.decode(tokenizer.encode(text)) == text for text in PROBES)
    tokenizer = Tokenizer(model, Description(**{**description.__dict__, "lossless": lossless}))
    tokenizer.save(output)
    return tokenizer


def _separator(backend, settings: Path, wanted: str) -> int:
    """Id of the piece that separates documents."""
    if isinstance(backend, SentencePiece):
        pieces = backend.pieces
        if not wanted and pieces.eos_id() >= 0:
            return pieces.eos_id()
        ids = {name: pieces.piece_to_id(name) for name in ((wanted,) if wanted else SEPARATORS)}
        found = [number for number in ids.values() if pieces.is_control(number)]
    else:
        names = (wanted,) if wanted else (_named(settings), *SEPARATORS)
        ids = [backend.tokenizer.token_to_id(name) for name in names if name]
        found = [number for number in ids if number is not None]
    if not found:
        what = f"has no separator '{wanted}'" if wanted else "names no separator of documents"
        raise ValueError(f"the tokenizer {what}: give the name of one of its control pieces with --end-of-text")
    return found[0]


def _named(settings: Path) -> str:
    """The end-of-sequence token that a `tokenizer_config.json` names."""
    if not settings.exists():
        return ""
    token = json.loads(settings.read_text(encoding="utf-8")).get("eos_token") or ""
    return token.get("content", "") if isinstance(token, dict) else token


@dataclass(frozen=True)
class MegatronFile:
    """Megatron's indexed dataset: flat tokens, and where each document lies in them."""

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
    tokens = np.memmap(prefix + ".bin", dtype, "r")
    if sequences and int(pointers[-1]) // dtype.itemsize + int(lengths[-1]) > len(tokens):
        raise ValueError(f"'{prefix}.bin' is shorter than its index says: copy it again")
    ends = np.concatenate([[0], np.cumsum(lengths)])
    return MegatronFile(tokens, pointers[bounds[:-1]] // dtype.itemsize, ends[bounds[1:]] - ends[bounds[:-1]])


def import_megatron(
    prefix: str,
    tokenizer_directory: str,
    output: str,
    validation_fraction: float = 0.005,
    shard_tokens: int = 64 << 20,
) -> dict[str, Manifest]:
    """Turn a Megatron dataset into `output/train` and `output/validation`; a separator is put behind documents without one.

    Raises ValueError for tokens the tokenizer does not have or an output that is not empty, FileNotFoundError.
    """
    tokenizer, source = Tokenizer.load(tokenizer_directory), open_megatron(prefix)
    dtype = token_dtype(tokenizer.vocab_size)
    if storage.exists(output) and storage.list_files(output, empty_ok=True):
        raise ValueError(f"'{output}' is not empty: choose another --output")
    parts = ("train", "validation") if validation_fraction else ("train",)
    shards: dict[str, list[ShardInfo]] = {part: [] for part in parts}
    drafts = {part: Draft(dtype) for part in parts}

    def flush(part: str) -> None:
        if drafts[part].lengths:
            name = f"shard-{len(shards[part]):06d}.arrow"
            shards[part].append(write_shard(storage.join(output, part, name), drafts[part]))
            drafts[part] = Draft(dtype)

    try:
        for start, length in zip(source.starts.tolist(), source.lengths.tolist()):
            document = _document(source.tokens[start : start + length], tokenizer, prefix)
            digest = hashlib.blake2b(document.tobytes(), digest_size=8).digest()
            part = "validation" if int.from_bytes(digest, "little") / 2**64 < validation_fraction else "train"
            drafts[part].add(document, tokenizer.end_of_text)
            if len(drafts[part].tokens) >= shard_tokens:
                flush(part)
        for part in parts:
            flush(part)
        return {part: _sealed(tokenizer, dtype, shards[part], storage.join(output, part)) for part in parts}
    except BaseException:  # nothing goes on from a half: it would only stand in the way of the next try
        for part in parts:
            storage.remove(storage.join(output, part))
        raise


def _document(tokens: np.ndarray, tokenizer: Tokenizer, prefix: str) -> np.ndarray:
    """A document's tokens without a separator at its end."""
    if len(tokens) and (int(tokens.max()) >= tokenizer.vocab_size or int(tokens.min()) < 0):
        raise ValueError(
            f"'{prefix}' holds token {int(tokens.max())} where the tokenizer has {tokenizer.vocab_size} pieces:"
            " import the tokenizer that made the dataset"
        )
    return tokens[:-1] if len(tokens) and int(tokens[-1]) == tokenizer.end_of_text else tokens


def _sealed(tokenizer: Tokenizer, dtype: np.dtype, shards: list[ShardInfo], directory: str) -> Manifest:
    counts = {"documents": sum(shard.documents for shard in shards), "part_tokens": sum(shard.tokens for shard in shards)}
    manifest = Manifest(tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.end_of_text, dtype.name, shards, counts).sealed()
    write_manifest(directory, manifest)
    return manifest
