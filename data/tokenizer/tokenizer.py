"""Tokenizers: text to token ids and back, identified by a fingerprint that shards and checkpoints record.

A tokenizer trained by tiglon is lossless: decode(encode(x)) == x for every valid Unicode text. Its sentencepiece model
neither normalizes text nor adds or removes spaces, and has all 256 bytes as a fallback; and U+2581, which sentencepiece uses
for the space and would decode as one, is encoded as its three bytes.

Long texts are encoded in segments that end with a newline. A newline is a piece of its own and part of no other, so the cut
changes nothing but the sums of scores: sentencepiece is faster on short strings, and more exact, since it adds up scores in
single precision.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from data import storage
from data.tokenizer.backends import SPACE_MARK, SentencePiece, open_backend

SEGMENT_CHARACTERS = 1 << 14
DESCRIPTION = "tiglon_tokenizer.json"
FILES = {"sentencepiece": "tokenizer.model", "huggingface": "tokenizer.json"}
END_OF_TEXT = "<|end_of_text|>"


@dataclass(frozen=True)
class TokenizerDescription:
    """The content of `tiglon_tokenizer.json`."""

    kind: str  # "sentencepiece" | "huggingface"
    model: str  # "unigram" | "bpe" | "imported"
    fingerprint: str  # of the function below
    vocab_size: int
    end_of_text: int  # id of the separator that ends each document
    lossless: bool
    begin_of_text: int | None = None  # id that begins each document and each prompt
    end_tokens: tuple[int, ...] = ()  # ids beside end_of_text at which the model that it came with ends a text
    token_ids: dict[str, Any] = field(default_factory=dict)  # bos_, eos_ and pad_token_id of that model's config.json


class Tokenizer:
    """Text to token ids and back, by either library."""

    def __init__(self, model: bytes, description: TokenizerDescription) -> None:
        self.model, self.description = model, description
        self.backend = open_backend(description.kind, model)
        self.vocab_size = description.vocab_size
        self.fingerprint = description.fingerprint
        self.end_of_text, self.begin_of_text = description.end_of_text, description.begin_of_text
        self.end_tokens = (description.end_of_text, *description.end_tokens)
        self._imported = description.model == "imported"
        byte_ids = [] if self._imported else self.byte_ids()
        self._space_mark_ids = [] if self._imported else [byte_ids[byte] for byte in SPACE_MARK.encode()]

    @property
    def has_scores(self) -> bool:
        """Whether pieces have log-probabilities: only those of unigram models that tiglon trained."""
        return self.description.model == "unigram"

    def scores(self) -> dict[str, tuple[int, float]]:
        """As `SentencePiece.scores`. Raises ValueError for a tokenizer that is not sentencepiece."""
        return self._sentencepiece().scores()

    def byte_ids(self) -> list[int]:
        """Ids of the 256 bytes. Raises ValueError for a tokenizer that is not sentencepiece."""
        return self._sentencepiece().byte_ids()

    def _sentencepiece(self) -> SentencePiece:
        if not isinstance(self.backend, SentencePiece):
            raise ValueError(f"this needs a sentencepiece tokenizer, but the tokenizer's kind is '{self.description.kind}'")
        return self.backend

    @staticmethod
    def load(directory: str) -> "Tokenizer":
        """Read a tokenizer directory. Raises FileNotFoundError or ValueError."""
        address = storage.join_address(directory, DESCRIPTION)
        if not storage.exists(address):
            raise FileNotFoundError(f"no tokenizer at '{directory}' ({_what_to_do(directory)}")
        try:
            values = storage.read_json(address)
            description = TokenizerDescription(**{**values, "end_tokens": tuple(values.get("end_tokens", ()))})
            _check_description(description)
            model = storage.read_bytes(storage.join_address(directory, FILES[description.kind]))
        except (ValueError, TypeError, KeyError, AttributeError) as reason:
            raise ValueError(
                f"'{address}' describes no tokenizer of this version of tiglon ({reason}): train again"
            ) from reason
        if fingerprint(model, description.begin_of_text) != description.fingerprint:
            raise ValueError(f"the model in '{directory}' is not the one {DESCRIPTION} describes: restore it or train again")
        return Tokenizer(model, description)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without the separator. Raises ValueError for text that is not valid Unicode."""
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """As `encode`, int32 [tokens]."""
        try:
            if self._imported:
                return self.backend.encode_array(text)
            parts = [self._encode_segment(segment) for segment in segments(text)]
        except (UnicodeEncodeError, RuntimeError, TypeError) as reason:
            raise ValueError(
                "text holds a lone surrogate, so it is not valid Unicode: repair it where it was decoded"
            ) from reason
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _encode_segment(self, text: str) -> np.ndarray:
        if SPACE_MARK not in text:
            return self.backend.encode_array(text)
        first, *rest = (self.backend.encode(part) for part in text.split(SPACE_MARK))
        return np.array(first + [token for part in rest for token in (*self._space_mark_ids, *part)], dtype=np.int32)

    def prompt(self, text: str) -> list[int]:
        """Token ids of a document's beginning: begin_of_text, or else the separator, and the text. Raises as `encode`."""
        first = self.end_of_text if self.begin_of_text is None else self.begin_of_text
        return [first, *self.encode(text)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids. Separators are left out; bytes that are not UTF-8 become U+FFFD."""
        return self.backend.decode([int(token) for token in ids])

    def continuation(self, prompt: Sequence[int], added: Sequence[int]) -> str:
        """Text that the ids `added` add to that of `prompt`. Many imported tokenizers drop a space that begins a text, so
        that `added` decoded alone would lack it."""
        before, whole = self.decode(prompt), self.decode([*prompt, *added])
        return whole[len(before) :] if whole.startswith(before) else self.decode(added)

    def unused_ids(self) -> tuple[int, ...]:
        """Ids below vocab_size that stand for nothing."""
        return tuple(index for index in self.backend.unused_ids() if index < self.vocab_size)

    def save(self, directory: str) -> None:
        """Write the model file and the description to a directory, or neither. Raises ValueError for one that holds others."""
        description = json.dumps(asdict(self.description), indent=1).encode()
        files = {FILES[self.description.kind]: self.model, DESCRIPTION: description}
        refuse_others(directory, files)
        addresses = {storage.join_address(directory, name): content for name, content in files.items()}
        missing = [address for address in addresses if not storage.exists(address)]
        try:
            for address in missing:
                storage.write_atomic(address, addresses[address])
        except BaseException:  # a model without its description would make the next start refuse the directory
            for address in missing:
                system, path = storage.locate(address)
                with suppress(OSError):
                    system.delete_file(path)
            raise


def refuse_others(directory: str, files: Mapping[str, bytes | None]) -> None:
    """Raises ValueError for a directory with a file that would be replaced by other content: shards that were made with the
    tokenizer there could not be used any more.

    Args:
        files: name -> content to be written; None when it is not known yet.
    """
    there = {name: storage.join_address(directory, name) for name in files}
    there = {name: address for name, address in there.items() if storage.exists(address)}
    others = [name for name, address in there.items() if files[name] is None or storage.read_bytes(address) != files[name]]
    if others:
        raise ValueError(
            f"'{directory}' holds another {' and '.join(others)}, which would be replaced: choose another --output, or remove "
            f"{'it' if len(others) == 1 else 'them'} if nothing needs that tokenizer any more"
        )


def _what_to_do(directory: str) -> str:
    """About a directory without a description; it may be a tokenizer as others keep it, or a file of one."""
    files = (*FILES.values(), "tokenizer_config.json")
    foreign = directory.endswith((".model", ".json")) or any(storage.exists(storage.join_address(directory, f)) for f in files)
    if foreign and storage.exists(directory):
        return f"it is another library's): run `tiglon tokenizer import {directory} --output DIR` and name that directory"
    return f"{DESCRIPTION} is missing): run `tiglon tokenizer train`, or `tiglon tokenizer import` for another library's"


def _check_description(description: TokenizerDescription) -> None:
    """Raises ValueError for values of other types than a description has, or that no tokenizer has."""
    try:
        TypeAdapter(TokenizerDescription).validate_json(json.dumps(asdict(description)), strict=True)
    except ValidationError as error:
        fault = error.errors()[0]
        raise ValueError(f"{fault['loc'][0]}: {fault['msg']}") from None
    begin = [] if description.begin_of_text is None else [description.begin_of_text]
    for index in (description.end_of_text, *begin, *description.end_tokens):
        if not 0 <= index < 1 << 31:
            raise ValueError(f"{index} is no id of a token")
    if not description.end_of_text < description.vocab_size < 1 << 31:
        raise ValueError(f"end_of_text {description.end_of_text} is no id of {description.vocab_size} pieces")


def segments(text: str) -> Iterator[str]:
    """Cut a text into segments of at most SEGMENT_CHARACTERS, after newlines where there are any."""
    start = 0
    while len(text) - start > SEGMENT_CHARACTERS:
        stop = text.rfind("\n", start, start + SEGMENT_CHARACTERS) + 1 or start + SEGMENT_CHARACTERS
        yield text[start:stop]
        start = stop
    yield text[start:]


def fingerprint(model: bytes, begin_of_text: int | None = None) -> str:
    """SHA-256 of a model file, and of the id that begins each document if there is one: what decides the ids of a document."""
    digest = hashlib.sha256(model)
    if begin_of_text is not None:
        digest.update(f" begin_of_text {begin_of_text}".encode())
    return digest.hexdigest()
