"""Train a lossless sentencepiece tokenizer: unigram or BPE, on a uniform sample of lines."""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from data.text.formats import TextFormat
from data.text.sampling import sample_lines
from data.text.sources import refuse_inside
from data.tokenizer.tokenizer import END_OF_TEXT, Tokenizer, TokenizerDescription, fingerprint

BYTES_PER_PIECE = 500
"""Text to sample per piece of the vocabulary: 16 MB for 32,000 pieces."""
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
        ValueError: wrong settings, unreadable text, or a vocabulary that the text is too short for.
        FileNotFoundError: no such input.
    """
    if model not in ("unigram", "bpe"):
        raise ValueError(f"model = '{model}': use 'unigram' or 'bpe'")
    if vocab_size < 300:
        raise ValueError(f"vocab_size = {vocab_size}: use at least 300, since 256 bytes and some letters must be in it")
    refuse_inside(output, inputs)
    budget = budget or TokenizerBudget()
    sample_bytes = budget.sample_bytes or BYTES_PER_PIECE * vocab_size
    sample = sample_lines(inputs, text_format or TextFormat(), sample_bytes, SAMPLE_SEED)
    if not sample.lines:
        why = "; ".join(sample.remarks) or "no documents"
        raise ValueError(f"{', '.join(inputs)}: no text to train a tokenizer on ({why})")
    drawn = f"lines sampled: {len(sample.lines):,} of {sample.seen:,}; training {vocab_size:,} {model} pieces"
    if log:
        log("\n".join([*sample.remarks, drawn]))
    trained = _train(sample.lines, vocab_size, model, budget.threads)
    content = _on_grid(trained) if model == "unigram" else trained
    tokenizer = Tokenizer(content, TokenizerDescription("sentencepiece", model, fingerprint(content), vocab_size, 1, True))
    tokenizer.save(output)
    return tokenizer


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
