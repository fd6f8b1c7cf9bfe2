"""Tokenizer libraries behind one interface: sentencepiece and Hugging Face's tokenizers."""

from typing import Protocol

import numpy as np
import sentencepiece

SPACE_MARK = "\u2581"  # what sentencepiece writes for a space inside its pieces


class TokenizerBackend(Protocol):
    """A tokenizer library with a model loaded. Ids are without separators; arrays are int32 [tokens]."""

    vocab_size: int

    def encode(self, text: str) -> list[int]: ...

    def encode_array(self, text: str) -> np.ndarray: ...

    def decode(self, ids: list[int]) -> str: ...

    def unused_ids(self) -> list[int]: ...


class SentencePiece:
    """A sentencepiece model."""

    def __init__(self, model: bytes) -> None:
        """Load a model file. Raises ValueError for bytes that are not one."""
        try:
            if not model:  # which the library takes for "load later"
                raise RuntimeError("it is empty")
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

    def unused_ids(self) -> list[int]:
        """Ids of pieces that the model marks as unused."""
        return [index for index in range(self.vocab_size) if self.pieces.is_unused(index)]

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
    """A Hugging Face `tokenizer.json`. The name of a special token in a text is text."""

    def __init__(self, model: bytes) -> None:
        """Load a `tokenizer.json`. Raises ValueError if the `tokenizers` package is missing or cannot read the file."""
        try:
            import tokenizers
        except ImportError as reason:
            raise ValueError(
                "a Hugging Face tokenizer needs the package `tokenizers`: pip install 'tiglon[huggingface]'"
            ) from reason
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

    def unused_ids(self) -> list[int]:
        """Ids below the largest that no token has."""
        return sorted(set(range(self.vocab_size)) - set(self.tokenizer.get_vocab(with_added_tokens=True).values()))

    def special_ids(self) -> set[int]:
        """Ids of special tokens, which no text encodes to."""
        return {index for index, token in self.tokenizer.get_added_tokens_decoder().items() if token.special}

    def ids_in_front(self) -> list[int]:
        """Ids that its post-processor puts before a text."""
        plain = self.encode("a")
        whole = self.tokenizer.encode("a", add_special_tokens=True).ids
        starts = (start for start in range(len(whole)) if whole[start : start + len(plain)] == plain)
        return whole[: next(starts, 0)]


def open_backend(kind: str, model: bytes) -> TokenizerBackend:
    """Load a model file of a kind ("sentencepiece" or "huggingface"). Raises ValueError."""
    match kind:
        case "sentencepiece":
            return SentencePiece(model)
        case "huggingface":
            return HuggingFace(model)
        case _:
            raise ValueError(f"tokenizer kind '{kind}' is unknown: sentencepiece or huggingface")
