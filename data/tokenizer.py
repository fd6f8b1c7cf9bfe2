"""Tokenizers: text to ids and back, named by a fingerprint that shards and checkpoints carry.

The ones trained here are lossless, decode(encode(x)) == x for every valid text. Two things make them so. The sentencepiece
model neither normalises nor adds nor removes spaces, and knows all 256 bytes. And U+2581, which sentencepiece uses inside
for the space and would hand back as one, is written as its three bytes.

Long texts are encoded in segments that end with a newline. A newline is a piece of its own and part of no other, so nothing
is lost by the cut; sentencepiece is faster on short strings, and more exact, since it adds up scores in single precision.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from data import storage
from data.sampling import sample_lines
from data.sources import Reading

SPACE_MARK = "\u2581"
SEGMENT_CHARACTERS = 1 << 14
SCORE_GRID = 64
"""Scores of unigram pieces are multiples of 1/64 nat. On this grid sums of a segment are exact in single precision (below
131,072 nats, which is 8 a character), in which sentencepiece adds them, as in double, in which Hugging Face's tokenizers
do: both see the same ties and break them alike, so that an exported tokenizer gives the same ids."""
DESCRIPTION = "tiglon_tokenizer.json"
FILES = {"sentencepiece": "tokenizer.model", "huggingface": "tokenizer.json"}
END_OF_TEXT = "<|end_of_text|>"


@dataclass(frozen=True)
class Description:
    """What `tiglon_tokenizer.json` says."""

    kind: str  # "sentencepiece" | "huggingface"
    model: str  # "unigram" | "bpe" | "imported"
    fingerprint: str
    vocab_size: int
    end_of_text: int
    lossless: bool


class Backend(Protocol):
    """What a tokenizer library does for us."""

    vocab_size: int

    def encode(self, text: str) -> list[int]: ...

    def encode_array(self, text: str) -> np.ndarray: ...

    def decode(self, ids: list[int]) -> str: ...


class SentencePiece:
    """A sentencepiece model."""

    def __init__(self, model: bytes) -> None:
        """Raises ValueError for bytes that are no model."""
        try:
            self.pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as reason:
            raise ValueError(f"the file is not a sentencepiece model ({reason})") from reason
        self.vocab_size = self.pieces.vocab_size()

    def encode(self, text: str) -> list[int]:
        return self.pieces.encode(text)

    def encode_array(self, text: str) -> np.ndarray:
        return self.pieces.EncodeAsNumpy(text)

    def decode(self, ids: list[int]) -> str:
        return self.pieces.decode(ids)

    def scores(self) -> dict[str, tuple[int, float]]:
        """Piece -> (id, log-probability) of the ordinary pieces, spaces written as spaces."""
        pieces = self.pieces
        special = (pieces.is_control, pieces.is_unknown, pieces.is_byte, pieces.is_unused)
        ordinary = (i for i in range(self.vocab_size) if not any(test(i) for test in special))
        return {pieces.id_to_piece(i).replace(SPACE_MARK, " "): (i, pieces.get_score(i)) for i in ordinary}

    def byte_ids(self) -> list[int]:
        """Ids of the 256 bytes."""
        return [self.pieces.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]


class HuggingFace:
    """A Hugging Face `tokenizer.json`; special tokens written out in a text are text."""

    def __init__(self, model: bytes) -> None:
        """Raises ValueError when the `tokenizers` package is missing or cannot read the file."""
        try:
            import tokenizers
        except ImportError as reason:
            raise ValueError("a Hugging Face tokenizer needs the package `tokenizers`: pip install tokenizers") from reason
        try:
            self.tokenizer = tokenizers.Tokenizer.from_buffer(model)
        except Exception as reason:  # the library raises bare Exception
            raise ValueError(f"the file is not a Hugging Face tokenizer.json ({reason})") from reason
        self.tokenizer.encode_special_tokens = True
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.vocab_size = max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_array(self, text: str) -> np.ndarray:
        return np.array(self.encode(text), dtype=np.int32)

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def open_backend(kind: str, model: bytes) -> Backend:
    """The library for a kind of model file. Raises ValueError."""
    match kind:
        case "sentencepiece":
            return SentencePiece(model)
        case "huggingface":
            return HuggingFace(model)
        case _:
            raise ValueError(f"tokenizer kind '{kind}' is unknown: sentencepiece or huggingface")


class Tokenizer:
    """Text to token ids and back."""

    def __init__(self, model: bytes, description: Description) -> None:
        self.model, self.description = model, description
        self.backend = open_backend(description.kind, model)
        self.vocab_size = description.vocab_size
        self.fingerprint = description.fingerprint
        self.end_of_text = description.end_of_text
        self._ours = description.model != "imported"
        bytes_ = self.byte_ids() if self._ours else []
        self._mark = [bytes_[byte] for byte in SPACE_MARK.encode()] if self._ours else []

    @property
    def has_scores(self) -> bool:
        """Whether pieces have log-probabilities, as those of our unigram models have."""
        return self.description.model == "unigram"

    def scores(self) -> dict[str, tuple[int, float]]:
        """Piece -> (id, log-probability) of the ordinary pieces, spaces written as spaces. Raises ValueError if it has none."""
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
        address = storage.join(directory, DESCRIPTION)
        if not storage.exists(address):
            raise FileNotFoundError(f"no tokenizer at '{directory}' ({DESCRIPTION} is missing): run `tiglon tokenizer train`")
        try:
            description = Description(**json.loads(storage.read_bytes(address)))
            model = storage.read_bytes(storage.join(directory, FILES[description.kind]))
        except (ValueError, TypeError, KeyError) as reason:
            raise ValueError(
                f"'{address}' describes no tokenizer of this version of tiglon ({reason}): train again"
            ) from reason
        if fingerprint(model) != description.fingerprint:
            raise ValueError(f"the model in '{directory}' is not the one {DESCRIPTION} describes: restore it or train again")
        return Tokenizer(model, description)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without the separator. Raises ValueError for text that is not valid Unicode."""
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """As `encode`, int32 [tokens]."""
        try:
            if not self._ours:
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
        return np.array(first + [token for part in rest for token in (*self._mark, *part)], dtype=np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; separators are left out, bytes that are no UTF-8 become U+FFFD."""
        return self.backend.decode([int(token) for token in ids])

    def save(self, directory: str) -> None:
        """Write the tokenizer directory."""
        storage.write_whole(storage.join(directory, FILES[self.description.kind]), self.model)
        text = json.dumps(asdict(self.description), indent=1)
        storage.write_whole(storage.join(directory, DESCRIPTION), text.encode())


def segments(text: str) -> Iterator[str]:
    """Cut a text behind newlines into parts of some 16 thousand characters; a line longer than that is cut where it is."""
    start = 0
    while len(text) - start > SEGMENT_CHARACTERS:
        stop = text.rfind("\n", start, start + SEGMENT_CHARACTERS) + 1 or start + SEGMENT_CHARACTERS
        yield text[start:stop]
        start = stop
    yield text[start:]


def fingerprint(model: bytes) -> str:
    """Name of a tokenizer: SHA-256 of its model file."""
    return hashlib.sha256(model).hexdigest()


def _on_grid(model: bytes) -> bytes:
    """A sentencepiece model with the scores of its ordinary pieces rounded to SCORE_GRID."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)  # type: ignore[attr-defined]
    for piece in proto.pieces:
        if piece.type == piece.NORMAL:
            piece.score = round(piece.score * SCORE_GRID) / SCORE_GRID
    return proto.SerializeToString()


def train_tokenizer(
    inputs: list[str],
    output: str,
    vocab_size: int,
    model: str = "unigram",
    sample_bytes: int | None = None,
    reading: Reading | None = None,
    threads: int = 2,
    seed: int = 0,
    log: Callable[[str], Any] | None = None,
) -> Tokenizer:
    """Train a sentencepiece model on a uniform sample of the inputs' lines and write it to a directory.

    Args:
        vocab_size: pieces, with the 256 bytes, newline and separator among them.
        model: "unigram" or "bpe".
        sample_bytes: memory for sampled lines; default 500 bytes a piece (2 MB for 4,096 pieces).
        log: called with one sentence per stage.
    Raises ValueError for settings or text that no vocabulary can be made of, FileNotFoundError for missing input.
    """
    if model not in ("unigram", "bpe"):
        raise ValueError(f"model = '{model}': use 'unigram' or 'bpe'")
    if vocab_size < 300:
        raise ValueError(f"vocab_size = {vocab_size}: use at least 300, since 256 bytes and some letters must be in it")
    lines, seen = sample_lines(inputs, reading or Reading(), sample_bytes or 500 * vocab_size, seed)
    if not lines:
        raise ValueError(f"the inputs {inputs} hold no text to train a tokenizer on")
    if log:
        log(f"sampled {len(lines):,} of {seen:,} lines; training {vocab_size:,} {model} pieces")
    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=written, model_type=model, vocab_size=vocab_size,
            byte_fallback=True, split_digits=True, normalization_rule_name="identity", add_dummy_prefix=False,
            remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, user_defined_symbols=["\n"],
            unk_id=0, bos_id=-1, pad_id=-1, eos_id=1, eos_piece=END_OF_TEXT, max_sentence_length=1 << 16,
            seed_sentencepiece_size=max(100_000, 10 * vocab_size), num_threads=threads, minloglevel=2,
        )  # fmt: skip
    except (RuntimeError, OSError) as reason:
        raise ValueError(
            f"no vocabulary of {vocab_size} pieces can be made of this text ({reason}): give more text or ask for fewer"
        ) from reason
    proto = _on_grid(written.getvalue()) if model == "unigram" else written.getvalue()
    trained = Tokenizer(proto, Description("sentencepiece", model, fingerprint(proto), vocab_size, 1, True))
    trained.save(output)
    return trained
