"""Export a tokenizer for transformers: tokenizer.json and tokenizer_config.json.

Pieces are written with plain spaces instead of sentencepiece's U+2581. So text needs neither normalization nor
pre-tokenization, and a U+2581 in it is encoded as its three bytes, as in tiglon: the export is lossless too.
"""

import json
from typing import Any

from data.tokenizer.backends import HuggingFace
from data.tokenizer.tokenizer import END_OF_TEXT, Tokenizer

UNKNOWN = "<unk>"


def tokenizer_files(tokenizer: Tokenizer, longest: int) -> dict[str, bytes]:
    """The files of an exported tokenizer: name -> content.

    Args:
        longest: context length of the model, in tokens (`model_max_length`).

    Raises:
        ValueError: for an imported sentencepiece model, which may normalize text in ways that tokenizer.json cannot express.
    """
    if isinstance(tokenizer.backend, HuggingFace):
        name, begin = tokenizer.backend.tokenizer.id_to_token, tokenizer.begin_of_text
        front = {"bos_token": None if begin is None else name(begin), "add_bos_token": begin is not None}
        settings = _settings(name(tokenizer.end_of_text), None, longest, front)
        return {"tokenizer.json": tokenizer.model, "tokenizer_config.json": settings}
    if tokenizer.description.model == "imported":
        raise ValueError(
            "an imported sentencepiece model cannot be exported exactly; use --tokenizer none and copy its ordinary files"
        )
    content = json.dumps(_tokenizer(tokenizer), ensure_ascii=False, indent=1).encode()
    return {"tokenizer.json": content, "tokenizer_config.json": _settings(END_OF_TEXT, UNKNOWN, longest)}


def _settings(end_of_text: str | None, unknown: str | None, longest: int, further: dict[str, Any] | None = None) -> bytes:
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **(further or {}),
        "eos_token": end_of_text,
        "unk_token": unknown,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # the name of a special token in a text is text
        "model_max_length": longest,
    }
    return json.dumps(settings, indent=1).encode()


def _tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    end = tokenizer.end_of_text
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": 0, "content": UNKNOWN, **special}, {"id": end, "content": END_OF_TEXT, **special}],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": _unigram(tokenizer) if tokenizer.has_scores else _bpe(tokenizer),
    }


def _pieces(tokenizer: Tokenizer) -> list[tuple[str, float]]:
    """(piece, score) of every id. The names of bytes and special tokens score so low that no text is encoded as them."""
    ordinary = tokenizer.scores()
    never = 30 * min(score for _, score in ordinary.values())
    pieces = [(f"<unused {index}>", never) for index in range(tokenizer.vocab_size)]
    pieces[0], pieces[tokenizer.end_of_text] = (UNKNOWN, never), (END_OF_TEXT, never)
    for byte, index in enumerate(tokenizer.byte_ids()):
        pieces[index] = (f"<0x{byte:02X}>", never)
    for piece, (index, score) in ordinary.items():
        pieces[index] = (piece, score)
    return pieces


def _unigram(tokenizer: Tokenizer) -> dict[str, Any]:
    return {"type": "Unigram", "unk_id": 0, "byte_fallback": True, "vocab": _pieces(tokenizer)}


def _bpe(tokenizer: Tokenizer) -> dict[str, Any]:
    """Merges in the order of their pieces, one for every pair of pieces that joins to a piece."""
    ordinary = tokenizer.scores()
    vocab = {piece: index for index, (piece, _) in enumerate(_pieces(tokenizer))}
    merges = []
    for piece, (_, score) in ordinary.items():
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        merges += [(-score, left, right) for left, right in pairs if left in ordinary and right in ordinary]
    merges.sort(key=lambda merge: (merge[0], ordinary[merge[1]][0], ordinary[merge[2]][0]))
    return {
        "type": "BPE", "dropout": None, "unk_token": UNKNOWN, "continuing_subword_prefix": None, "end_of_word_suffix": None,
        "fuse_unk": True, "byte_fallback": True, "ignore_merges": False, "vocab": vocab,
        "merges": [[left, right] for _, left, right in merges],
    }  # fmt: skip
