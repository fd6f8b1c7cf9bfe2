"""Import a tokenizer that was trained elsewhere: a sentencepiece model or a Hugging Face tokenizer.json."""

import json
from pathlib import Path

from data import storage
from data.tokenizer.backends import HuggingFace, SentencePiece, TokenizerBackend, open_backend
from data.tokenizer.tokenizer import FILES, Tokenizer, TokenizerDescription, fingerprint

SEPARATORS = ("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "[EOS]")
"""Names under which tokenizers have the token that ends a document, in the order in which they are tried."""
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
"""Texts that a tokenizer must return unchanged to be called lossless: spaces, control characters, rare letters, names of
special tokens."""


def import_tokenizer(source: str, output: str, end_of_text: str = "") -> Tokenizer:
    """Copy a sentencepiece `.model` or a Hugging Face `tokenizer.json` (or a folder with one) into a tokenizer directory.

    Args:
        end_of_text: the piece that separates documents; default: the one that the tokenizer names, else one of SEPARATORS.

    Returns the tokenizer; `description.lossless` says whether it returns each of PROBES unchanged.

    Raises:
        FileNotFoundError: no tokenizer file at `source`.
        ValueError: the file cannot be read, or has no such separator.
    """
    path = Path(source)
    if path.is_dir():
        files = [path / name for name in FILES.values() if (path / name).exists()]
        if not files:
            raise FileNotFoundError(f"'{source}' holds neither {' nor '.join(FILES.values())}: give the tokenizer's file")
        path = files[-1]
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer file at '{source}'")
    storage.refuse_lfs_pointer(path)
    model, kind = path.read_bytes(), "huggingface" if path.suffix == ".json" else "sentencepiece"
    backend = open_backend(kind, model)
    separator = _separator(backend, path.parent / "tokenizer_config.json", end_of_text)
    description = TokenizerDescription(kind, "imported", fingerprint(model), backend.vocab_size, separator, False)
    tokenizer = Tokenizer(model, description)
    lossless = all(tokenizer.decode(tokenizer.encode(text)) == text for text in PROBES)
    tokenizer = Tokenizer(model, TokenizerDescription(**{**description.__dict__, "lossless": lossless}))
    tokenizer.save(output)
    return tokenizer


def _separator(backend: TokenizerBackend, settings: Path, wanted: str) -> int:
    """Id of the piece that separates documents."""
    if isinstance(backend, SentencePiece):
        pieces = backend.pieces
        if not wanted and pieces.eos_id() >= 0:
            return pieces.eos_id()
        ids = [pieces.piece_to_id(name) for name in ((wanted,) if wanted else SEPARATORS)]
        candidates = [index for index in ids if pieces.is_control(index)]
    else:
        assert isinstance(backend, HuggingFace)
        names = (wanted,) if wanted else (_end_of_sequence(settings), *SEPARATORS)
        ids = [backend.tokenizer.token_to_id(name) for name in names if name]
        candidates = [index for index in ids if index is not None]
    if not candidates:
        what = f"has no separator '{wanted}'" if wanted else "names no separator of documents"
        raise ValueError(f"the tokenizer {what}: give the name of one of its control pieces with --end-of-text")
    return candidates[0]


def _end_of_sequence(settings: Path) -> str:
    """The end-of-sequence token that a `tokenizer_config.json` names; "" if there is none."""
    if not settings.exists():
        return ""
    token = json.loads(settings.read_text(encoding="utf-8")).get("eos_token") or ""
    return token.get("content", "") if isinstance(token, dict) else token
