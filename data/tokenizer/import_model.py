"""Import a tokenizer that was trained elsewhere: a sentencepiece model or a Hugging Face tokenizer.json."""

from dataclasses import replace
from pathlib import Path
from typing import Any

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
SETTINGS = "tokenizer_config.json"
VERSIONED = "*.model.v[0-9]*"
"""Sentencepiece models as Mistral names them, by the version of their control pieces."""
TEKKEN = "tekken.json"


def import_tokenizer(source: str, output: str, end_of_text: str = "", begin_of_text: str = "") -> Tokenizer:
    """Copy a sentencepiece `.model` or a Hugging Face `tokenizer.json` (or a folder with one) into a tokenizer directory.

    Args: as `read_foreign`.

    Returns the tokenizer; `description.lossless` says whether it returns each of PROBES unchanged.

    Raises:
        FileNotFoundError, ValueError: as `read_foreign`.
    """
    tokenizer = read_foreign(source, end_of_text, begin_of_text)
    tokenizer.save(output)
    return tokenizer


def read_foreign(source: str, end_of_text: str = "", begin_of_text: str = "", rows: int | None = None) -> Tokenizer:
    """A tokenizer of another library.

    Args:
        source: a sentencepiece model, a `tokenizer.json`, or a folder with one.
        end_of_text: the piece that separates documents; default: the one that the tokenizer names, else one of SEPARATORS.
        begin_of_text: the piece that begins each document, or "none"; default: what the tokenizer puts before a text.
        rows: of the embedding that it comes with. Special tokens beyond them are left out.

    Raises:
        FileNotFoundError: no tokenizer file at `source`.
        ValueError: the file cannot be read, has no such piece, or has pieces beyond `rows` that texts may contain.
    """
    path = _model_file(Path(source))
    storage.refuse_lfs_pointer(path)
    model, kind = path.read_bytes(), "huggingface" if path.suffix == ".json" else "sentencepiece"
    if path.name == TEKKEN or (kind == "huggingface" and b'"token_bytes"' in model[: 1 << 16]):
        raise ValueError(
            f"{path} is a Tekken tokenizer, Mistral's format for tiktoken, which tiglon does not read: give the tokenizer.json "
            "of the same model"
        )
    try:
        backend = open_backend(kind, model)
    except ValueError as reason:
        raise ValueError(f"{path}: {reason}") from reason
    settings = _settings(path.parent / SETTINGS)
    separator = _separator(backend, settings, end_of_text)
    begin = _begin(backend, settings, begin_of_text)
    size = backend.vocab_size if rows is None else _within(backend, rows)
    description = TokenizerDescription(kind, "imported", fingerprint(model, begin), size, separator, False, begin)
    tokenizer = Tokenizer(model, description)
    lossless = all(tokenizer.decode(tokenizer.encode(text)) == text for text in PROBES)
    return Tokenizer(model, replace(description, lossless=lossless))


def _model_file(path: Path) -> Path:
    """The file that a path means: of a folder, tokenizer.json before tokenizer.model before the newest tokenizer.model.vN."""
    if path.is_dir():
        files = [path / name for name in FILES.values() if (path / name).exists()]
        files = [*sorted(path.glob(VERSIONED)), *files] or [file for file in (path / TEKKEN,) if file.exists()]
        if not files:
            raise FileNotFoundError(f"'{path}' holds neither {' nor '.join(FILES.values())}: give the tokenizer's file")
        path = files[-1]
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer file at '{path}'")
    return path


def _settings(path: Path) -> dict[str, Any]:
    """The content of a `tokenizer_config.json`; {} where there is none. Raises ValueError."""
    if not path.exists():
        return {}
    storage.refuse_lfs_pointer(path)
    settings = storage.read_json(str(path))
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds no JSON object; copy it again")
    return settings


def _separator(backend: TokenizerBackend, settings: dict[str, Any], wanted: str) -> int:
    """Id of the piece that separates documents."""
    if isinstance(backend, SentencePiece) and not wanted and backend.pieces.eos_id() >= 0:
        return backend.pieces.eos_id()
    named = () if isinstance(backend, SentencePiece) else (_name(settings, "eos_token"),)
    candidates = [_id_of(backend, name) for name in ((wanted,) if wanted else (*named, *SEPARATORS))]
    found = next((index for index in candidates if index is not None), None)
    if found is None:
        what = f"has no separator '{wanted}'" if wanted else "names no separator of documents"
        raise ValueError(f"the tokenizer {what}: give the name of one of its control pieces with --end-of-text")
    return found


def _begin(backend: TokenizerBackend, settings: dict[str, Any], wanted: str) -> int | None:
    """Id of the piece that begins documents; None if there is none."""
    adds = settings.get("add_bos_token")
    if wanted == "none" or (not wanted and adds is False):
        return None
    if wanted or (adds and _name(settings, "bos_token")):
        name = wanted or _name(settings, "bos_token")
        if (found := _id_of(backend, name)) is None:
            raise ValueError(
                f"the tokenizer has no piece '{name}' to begin documents with: give the name of one of its control pieces with "
                "--begin-of-text, or none"
            )
        return found
    if isinstance(backend, SentencePiece):
        return backend.pieces.bos_id() if backend.pieces.bos_id() >= 0 else None
    assert isinstance(backend, HuggingFace)
    front = backend.ids_in_front()
    if len(front) > 1:
        raise ValueError(
            f"the tokenizer puts {len(front)} tokens before a text, where tiglon puts one: name it with --begin-of-text"
        )
    return front[0] if front else None


def _id_of(backend: TokenizerBackend, name: str) -> int | None:
    """Id of a control piece, or of a token; None if there is none of that name."""
    if isinstance(backend, SentencePiece):
        index = backend.pieces.piece_to_id(name)
        return index if backend.pieces.is_control(index) else None
    assert isinstance(backend, HuggingFace)
    return backend.tokenizer.token_to_id(name) if name else None


def _name(settings: dict[str, Any], key: str) -> str:
    """The name of a special token in a `tokenizer_config.json`; "" if it has none."""
    token = settings.get(key)
    name = token.get("content") if isinstance(token, dict) else token
    return name if isinstance(name, str) else ""


def _within(backend: TokenizerBackend, rows: int) -> int:
    """Ids of the tokenizer that have one of the `rows` of an embedding. Raises ValueError where a text may need others."""
    beyond = set(range(rows, backend.vocab_size)) - set(backend.unused_ids())
    if isinstance(backend, HuggingFace):
        beyond -= backend.special_ids()
    if beyond:
        raise ValueError(
            f"the tokenizer has token {min(beyond)} and the embedding {rows} rows: give the tokenizer of this very model"
        )
    return min(backend.vocab_size, rows)
