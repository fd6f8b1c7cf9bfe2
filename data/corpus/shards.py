"""Shards: token files anyone can read.

A shard is one Arrow IPC file with one record batch and one column `tokens` (large_list of uint16 or uint32): a row is a
document and ends with the separator, so the flat values are the token stream itself and the list offsets are the
document boundaries:

    import pyarrow as pa
    table = pa.ipc.open_file(pa.memory_map("out/train/shard-000000.arrow")).read_all()
    document = table["tokens"][0].values.to_numpy()

A part (`train`, `validation`) is a folder of shards and a `manifest.json` that says for each shard how many tokens and
documents it holds, its size and checksum, and where in the file its tokens begin: a sample is one read at a known offset,
in a memory map or in an object store.
"""

import hashlib
import json
from collections import OrderedDict
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from data import storage

MANIFEST = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class ShardInfo:
    """What the manifest says of one shard."""

    file: str
    tokens: int
    documents: int
    bytes: int
    tokens_at: int  # byte in the file at which the tokens begin
    sha256: str


@dataclass(frozen=True)
class CorpusManifest:
    """A prepared part of a corpus. `fingerprint` names its tokens: same fingerprint, same stream."""

    tokenizer: str  # fingerprint of the tokenizer
    vocab_size: int
    end_of_text: int
    dtype: str  # "uint16" | "uint32"
    shards: list[ShardInfo]
    counts: dict[str, Any] = field(default_factory=dict)
    fingerprint: str = ""

    def sealed(self) -> "CorpusManifest":
        """The same manifest with its fingerprint filled in."""
        digest = hashlib.sha256(f"{self.tokenizer} {self.end_of_text} {self.dtype}".encode())
        for shard in self.shards:
            digest.update(f"{shard.tokens} {shard.sha256}".encode())
        return CorpusManifest(**{**self.__dict__, "fingerprint": digest.hexdigest()})


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest unsigned type that holds every token id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


class ShardDraft:
    """The documents of a shard in the making, in one growing buffer."""

    def __init__(self, dtype: np.dtype) -> None:
        self.dtype = dtype
        self.lengths: list[int] = []
        self._buffer = bytearray()

    def add(self, tokens: np.ndarray, end_of_text: int) -> None:
        """Put a document (1-D tokens without its separator) behind the others."""
        self._buffer += tokens.astype(self.dtype).tobytes()
        self._buffer += self.dtype.type(end_of_text).tobytes()
        self.lengths.append(len(tokens) + 1)

    @property
    def tokens(self) -> np.ndarray:
        """All tokens so far, separators among them (a view)."""
        return np.frombuffer(self._buffer, self.dtype)


def write_shard(address: str, draft: ShardDraft) -> ShardInfo:
    """Write documents as one shard; returns its manifest entry."""
    tokens = draft.tokens
    offsets = np.zeros(len(draft.lengths) + 1, dtype=np.int64)
    np.cumsum(draft.lengths, out=offsets[1:])
    column = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(tokens))
    batch = pa.record_batch([column], names=["tokens"])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    whole = sink.getvalue()
    values = pa.ipc.open_file(whole).get_batch(0).column(0).values
    storage.write_atomic(address, whole)
    return ShardInfo(
        file=address.partition("?")[0].rsplit("/", 1)[-1],
        tokens=len(tokens),
        documents=len(draft.lengths),
        bytes=whole.size,
        tokens_at=values.buffers()[1].address - whole.address,
        sha256=hashlib.sha256(whole).hexdigest(),
    )


def write_corpus_manifest(directory: str, manifest: CorpusManifest) -> None:
    """Write `directory/manifest.json`; its presence says that the part is complete."""
    value = {"format": FORMAT, **asdict(manifest)}
    shards = value.pop("shards")
    lines = ",\n".join(json.dumps(shard) for shard in shards)
    head = json.dumps(value, indent=1, ensure_ascii=False)
    storage.write_atomic(storage.join_address(directory, MANIFEST), f'{head[:-2]},\n "shards": [\n{lines}\n ]\n}}\n'.encode())


def read_corpus_manifest(directory: str) -> CorpusManifest:
    """Read a part's manifest. Raises FileNotFoundError (nothing there) or ValueError (not a prepared part)."""
    if not storage.exists(directory):
        raise FileNotFoundError(f"no prepared corpus at '{directory}': run `tiglon prepare` or correct the path in [data]")
    address = storage.join_address(directory, MANIFEST)
    if not storage.exists(address):
        hint = (
            f"; did you mean '{storage.join_address(directory, 'train')}'"
            if storage.exists(storage.join_address(directory, "train"))
            else ""
        )
        raise ValueError(f"'{directory}' has no {MANIFEST}, so its preparation is not finished{hint}: run `tiglon prepare`")
    try:
        value = storage.read_json(address)
        if value.pop("format") != FORMAT:
            raise ValueError("another format")
        manifest = CorpusManifest(**{**value, "shards": [ShardInfo(**shard) for shard in value["shards"]]})
        _check_manifest(manifest, directory)
        return manifest
    except (ValueError, KeyError, TypeError, AttributeError) as reason:
        raise ValueError(
            f"'{address}' is not a manifest of this version of tiglon ({reason}): prepare the corpus again"
        ) from reason


def _check_manifest(manifest: CorpusManifest, directory: str) -> None:
    """Raises ValueError for what cannot be true of any shards: a corpus may be a stranger's."""
    if manifest.dtype not in ("uint16", "uint32"):
        raise ValueError(f"dtype is {_shown(manifest.dtype)}, wanted uint16 or uint32")
    texts, numbers = (manifest.tokenizer, manifest.fingerprint), (manifest.vocab_size, manifest.end_of_text)
    if not all(isinstance(text, str) for text in texts) or not all(map(_is_count, numbers)):
        raise ValueError("its tokenizer and fingerprint are to be text, vocab_size and end_of_text whole numbers")
    if not isinstance(manifest.counts, dict):
        raise ValueError("its counts are no object")
    width = np.dtype(manifest.dtype).itemsize
    for shard in manifest.shards:
        storage.inside(directory, shard.file, storage.join_address(directory, MANIFEST))
        if not all(map(_is_count, (shard.tokens, shard.documents, shard.bytes, shard.tokens_at))):
            raise ValueError(f"{_shown(shard.file)} has a count that is no whole number from 0 to 2**63 - 1")
        if shard.tokens_at + width * shard.tokens > shard.bytes or shard.documents > shard.tokens:
            raise ValueError(f"{_shown(shard.file)} cannot hold {shard.tokens} tokens in {shard.bytes} bytes")
        if not isinstance(shard.sha256, str):
            raise ValueError(f"{_shown(shard.file)} has a checksum that is no text")
    if sum(shard.tokens for shard in manifest.shards) >= 1 << 63:
        raise ValueError("its shards hold more tokens than any file system does")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _shown(value: object) -> str:
    return ascii(value)[:100]


class Corpus:
    """The tokens of a prepared part as one long array, read in place.

    Local shards are memory-mapped, `open_shards` of them at a time; shards in an object store are read by range.
    """

    def __init__(self, directory: str, open_shards: int = 512) -> None:
        self.directory = directory
        self.manifest = read_corpus_manifest(directory)
        self.dtype = np.dtype(self.manifest.dtype)
        self.ends = np.cumsum([shard.tokens for shard in self.manifest.shards], dtype=np.int64)
        self.tokens = int(self.ends[-1]) if len(self.ends) else 0
        self._system, self._root = storage.locate(directory)
        self._local = not storage.is_remote(directory)
        self._open: OrderedDict[int, Any] = OrderedDict()
        self._open_limit = open_shards

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the corpus: a view into the map when one shard holds them all, else a copy.

        Raises ValueError for a token outside the vocabulary, or a shard that is not as the manifest says.
        """
        assert 0 <= start <= stop <= self.tokens
        parts = []
        shard = int(np.searchsorted(self.ends, start, side="right"))
        while start < stop:
            begin = int(self.ends[shard]) - self.manifest.shards[shard].tokens
            upto = min(stop, int(self.ends[shard]))
            parts.append(self._slice(shard, start - begin, upto - begin))
            start, shard = upto, shard + 1
        tokens = parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, self.dtype), *parts])
        if len(tokens) and int(tokens.max()) >= self.manifest.vocab_size:
            raise ValueError(
                f"'{self.directory}' holds token {int(tokens.max())}, but the vocabulary of its manifest has "
                f"{self.manifest.vocab_size}: prepare the corpus again"
            )
        return tokens

    def _slice(self, index: int, start: int, stop: int) -> np.ndarray:
        info, width = self.manifest.shards[index], self.dtype.itemsize
        file = self._opened(index)
        if self._local:
            return file[start:stop]
        with storage.named_errors(storage.join_address(self.directory, info.file)):
            return np.frombuffer(file.read_at((stop - start) * width, info.tokens_at + start * width), self.dtype)

    def _opened(self, index: int) -> Any:
        if index in self._open:
            self._open.move_to_end(index)
            return self._open[index]
        info = self.manifest.shards[index]
        path = f"{self._root}/{info.file}"
        with storage.named_errors(storage.join_address(self.directory, info.file)):
            size = self._system.get_file_info(path).size
        if size != info.bytes:
            raise ValueError(
                f"shard '{path}' has {size or 0} bytes where its manifest says {info.bytes}: prepare the corpus again"
            )
        if self._local:
            value = np.frombuffer(pa.memory_map(path).read_buffer(), self.dtype, info.tokens, info.tokens_at)
        else:
            with storage.named_errors(storage.join_address(self.directory, info.file)):
                value = self._system.open_input_file(path)
        self._open[index] = value
        if len(self._open) > self._open_limit:
            self._open.popitem(last=False)
        return value

    def document_starts(self) -> np.ndarray:
        """First token of each document, and the end of the last; int64 [documents + 1].

        Reads 8 bytes per document: the boundaries, which a shard has before its tokens. Raises ValueError for a shard without.
        """
        ends = [np.zeros(1, np.int64)]
        for index, shard in enumerate(self.manifest.shards):
            ends.append(self._document_ends(index) + (int(self.ends[index]) - shard.tokens))
        return np.concatenate(ends)

    def _document_ends(self, index: int) -> np.ndarray:
        """End of each document within a shard."""
        info, width = self.manifest.shards[index], 8
        address, size = storage.join_address(self.directory, info.file), width * (info.documents + 1)
        self._opened(index)  # it has the size that the manifest says
        offsets = np.empty(0, np.int64)
        if size <= info.tokens_at:
            with storage.named_errors(address), self._system.open_input_file(f"{self._root}/{info.file}") as file:
                offsets = np.frombuffer(file.read_at(size, info.tokens_at - size), "<i8")
        if not len(offsets) or offsets[0] or offsets[-1] != info.tokens or (np.diff(offsets) < 1).any():
            raise ValueError(
                f"shard '{address}' has no boundaries of {info.documents} documents before its tokens: prepare the corpus again"
            )
        return offsets[1:]

    def close(self) -> None:
        """Close all files."""
        self._open.clear()
