"""Train a lossless sentencepiece tokenizer: unigram or BPE, on a uniform sample of lines."""

import errno
import io
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from data import storage
from data.text.formats import TextFormat
from data.text.sampling import sample_lines
from data.text.sources import refuse_inside
from data.tokenizer.tokenizer import (
    DESCRIPTION,
    END_OF_TEXT,
    FILES,
    Tokenizer,
    TokenizerDescription,
    fingerprint,
    refuse_others,
)

BYTES_PER_PIECE = 500
"""Text to sample per piece of the vocabulary: 16 MB for 32,000 pieces."""
LARGEST_VOCABULARY, MOST_THREADS = 1 << 24, 1024
"""Pieces and threads that sentencepiece can still make use of; it counts seeds, ten per piece, in 32 bits."""
SAMPLE_SEED = 0
SCORE_GRID = 64
"""Scores of unigram pieces are multiples of 1/64 nat. On this grid the scores of a segment add up exactly in single precision
(below 131,072 nats: 8 nats per character), which sentencepiece uses, as in double precision, which Hugging Face's tokenizers
use: both see the same ties and break them alike, so that an exported tokenizer gives the same ids."""


def _on_grid(model: bytes) -> bytes:
    """A sentencepiece model with the scores of its ordinary pieces rounded to SCORE_GRID."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)  # type: ignore[attr-defined]
    for piece in proto.pieces:
        if piece.type == piece.NORMAL:
            piece.score = round(piece.score * SCORE_GRID) / SCORE_GRID
    return proto.SerializeToString()


@dataclass(frozen=True)
class TokenizerBudget:
    """What training a tokenizer may use."""

    sample_bytes: int | None = None  # characters of sampled lines held in memory; None = BYTES_PER_PIECE for each piece
    threads: int = 2


def train_tokenizer(
    inputs: list[str],
    output: str,
    vocab_size: int,
    model: str = "unigram",
    text_format: TextFormat | None = None,
    budget: TokenizerBudget | None = None,
    log: Callable[[str], Any] | None = None,
) -> Tokenizer:
    """Train a sentencepiece model on a uniform sample of the inputs' lines and write it to the directory `output`.

    Args:
        vocab_size: pieces, with the 256 bytes, newline and separator among them.
        model: "unigram" or "bpe".
        log: called with one sentence per stage.

    Raises:
        ValueError: wrong settings, unreadable text, a vocabulary that the text is too short for, or an output that holds a
            tokenizer.
        FileNotFoundError: no such input.
        NotADirectoryError, PermissionError: an output that cannot be written.
    """
    budget = budget or TokenizerBudget()
    _check_settings(vocab_size, model, budget)
    refuse_inside(output, inputs)
    _check_output(output)
    sample_bytes = BYTES_PER_PIECE * vocab_size if budget.sample_bytes is None else budget.sample_bytes
    sample = sample_lines(inputs, text_format or TextFormat(), sample_bytes, SAMPLE_SEED)
    if not sample.lines:
        raise ValueError(
            f"{', '.join(inputs)}: no text to train a tokenizer on ({'; '.join(sample.remarks) or 'no documents'})"
        )
    drawn = f"lines sampled: {len(sample.lines):,} of {sample.seen:,}; training {vocab_size:,} {model} pieces"
    if log:
        log("\n".join([*sample.remarks, drawn]))
    trained = _train(sample.lines, vocab_size, model, budget.threads)
    content = _on_grid(trained) if model == "unigram" else trained
    tokenizer = Tokenizer(content, TokenizerDescription("sentencepiece", model, fingerprint(content), vocab_size, 1, True))
    tokenizer.save(output)
    return tokenizer


def _check_settings(vocab_size: int, model: str, budget: TokenizerBudget) -> None:
    """Raises ValueError for what sentencepiece cannot train by."""
    if model not in ("unigram", "bpe"):
        raise ValueError(f"model = '{model}': use 'unigram' or 'bpe'")
    if not 300 <= vocab_size <= LARGEST_VOCABULARY:
        raise ValueError(
            f"vocab_size = {vocab_size}: use at least 300, since 256 bytes and some letters must be in it, "
            f"and at most {LARGEST_VOCABULARY:,}"
        )
    if not 1 <= budget.threads <= MOST_THREADS:
        raise ValueError(f"threads = {budget.threads}: give 1 to {MOST_THREADS:,}")


def _check_output(output: str) -> None:
    """Raises ValueError for a directory with a tokenizer, OSError for a local one that cannot be written: before the minutes of
    training."""
    refuse_others(output, {FILES["sentencepiece"]: None, DESCRIPTION: None})
    if storage.is_remote(output):
        return
    place = Path(storage.locate(output)[1])
    while not place.exists():
        place = place.parent
    for fault, wrong in ((errno.ENOTDIR, not place.is_dir()), (errno.EACCES, not os.access(place, os.W_OK | os.X_OK))):
        if wrong:
            raise OSError(fault, os.strerror(fault), str(place))


def _train(lines: list[str], vocab_size: int, model: str, threads: int) -> bytes:
    """A sentencepiece model file."""
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
        raise ValueError(_training_fault(str(reason), sum(map(len, lines)), vocab_size)) from reason
    return written.getvalue()


def _training_fault(reason: str, characters: int, vocab_size: int) -> str:
    """What sentencepiece's error means, in one sentence."""
    if limit := re.search(r"Vocabulary size too high.*<= (\d+)", reason):
        return (
            f"vocab_size = {vocab_size:,}, but the {characters:,} characters of sampled text yield at most {int(limit[1]):,} "
            f"pieces: give more text (some {BYTES_PER_PIECE} bytes per piece, {BYTES_PER_PIECE * vocab_size / 1e6:,.1f} MB) or "
            "a smaller --vocab-size"
        )
    if needed := re.search(r"smaller than required_chars. \d+ vs (\d+)", reason):
        return f"vocab_size = {vocab_size:,}, but the letters of the text alone need {int(needed[1]):,}: raise --vocab-size"
    return f"sentencepiece cannot make {vocab_size:,} pieces of this text ({reason}): give more text or another --vocab-size"
