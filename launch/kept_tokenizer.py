"""The tokenizer of an imported model, a directory inside its checkpoint:

    tokenizer/tiglon_tokenizer.json     with the model file, a tokenizer directory as any other (data/tokenizer/tokenizer.py)
    tokenizer/tokenizer.json            or tokenizer.model
    tokenizer/original/...              every file of the tokenizer as it came, which `tiglon export` writes again

The first two are missing where tiglon cannot read the tokenizer.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from data import storage
from data.tokenizer.huggingface import tokenizer_files
from data.tokenizer.import_model import SETTINGS, TEKKEN, VERSIONED, read_foreign
from data.tokenizer.tokenizer import DESCRIPTION, FILES, Tokenizer
from launch.config import RunConfig

KEPT_TOKENIZER = "tokenizer"
"""Directory inside an imported checkpoint."""
ORIGINAL = "original"
GENERATION = "generation_config.json"
TOKENIZER_FILES = (
    *FILES.values(), VERSIONED, TEKKEN, SETTINGS, GENERATION, "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.json", "chat_template.jinja",
)  # fmt: skip
"""Files of a tokenizer, and the one that says where generation ends; patterns."""
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def kept_tokenizer(directory: Path, settings: dict[str, Any], rows: int) -> tuple[dict[str, bytes], str]:
    """What an import keeps of the tokenizer of a Hugging Face model.

    Args:
        settings: the model's config.json.
        rows: of its embedding.

    Returns:
        (path inside the checkpoint -> content, one sentence on why tiglon cannot use the tokenizer or "").

    Raises:
        ValueError: a file is a Git LFS pointer.
    """
    originals = _originals(directory)
    files = {f"{KEPT_TOKENIZER}/{ORIGINAL}/{name}": content for name, content in originals.items()}
    if not set(originals) - {GENERATION}:
        return files, "without a tokenizer: none is beside the model"
    try:
        tokenizer = read_foreign(str(directory), rows=rows)
    except (ValueError, FileNotFoundError) as reason:
        return files, f"the files of its tokenizer are kept ({KEPT_TOKENIZER}/{ORIGINAL}), but tiglon cannot use it: {reason}"
    token_ids = {key: settings[key] for key in TOKEN_IDS if key in settings}
    ends = [*as_list(settings.get("eos_token_id")), *_generation_ends(originals)]
    ends = tuple(sorted(set(ends) - {tokenizer.end_of_text}))
    description = replace(tokenizer.description, end_tokens=ends, token_ids=token_ids)
    files[f"{KEPT_TOKENIZER}/{FILES[description.kind]}"] = tokenizer.model
    files[f"{KEPT_TOKENIZER}/{DESCRIPTION}"] = json.dumps(asdict(description), indent=1).encode()
    return files, ""


def _originals(directory: Path) -> dict[str, bytes]:
    """Name -> content of every file of a tokenizer. Raises ValueError for a Git LFS pointer."""
    paths = sorted({path for name in TOKENIZER_FILES for path in directory.glob(name) if path.is_file()})
    for path in paths:
        storage.refuse_lfs_pointer(path)
    return {path.name: path.read_bytes() for path in paths}


def _generation_ends(originals: dict[str, bytes]) -> list[int]:
    try:
        settings = json.loads(originals.get(GENERATION, b"{}"))
    except ValueError:
        return []
    return as_list(settings.get("eos_token_id")) if isinstance(settings, dict) else []


def as_list(ids: int | list[int] | None) -> list[int]:
    """The ids of a key of config.json that is an id, a list of them, or null."""
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def open_kept(checkpoint: str) -> Tokenizer | None:
    """The tokenizer that an imported checkpoint keeps; None for any other checkpoint.

    Raises:
        FileNotFoundError, ValueError: it cannot be read.
    """
    kept = Path(checkpoint) / KEPT_TOKENIZER
    if not kept.is_dir() or not set(_names(kept)) - {GENERATION}:
        return None
    if (kept / DESCRIPTION).exists():
        return Tokenizer.load(str(kept))
    return read_foreign(str(kept / ORIGINAL if (kept / ORIGINAL).is_dir() else kept))  # of 0.1.0: the files themselves


def _names(kept: Path) -> list[str]:
    """Names of the files of a kept tokenizer."""
    return [path.name for path in kept.rglob("*") if path.is_file()]


def starting_config(config: RunConfig, checkpoint: Path, files: dict[str, bytes]) -> RunConfig:
    """The configuration of a run that starts from an import.

    Args:
        config: of the import, without paths.
        checkpoint: where it is written. The paths are absolute, so that they hold in every working directory.
        files: of its tokenizer (`kept_tokenizer`).
    """
    root = checkpoint.absolute()
    start = {"resume": str(root), "reset_optimizer": True}
    data = {"tokenizer": str(root / KEPT_TOKENIZER)} if f"{KEPT_TOKENIZER}/{DESCRIPTION}" in files else {}
    return config.model_copy(
        update={
            "checkpoint": config.checkpoint.model_copy(update=start),
            "data": config.data.model_copy(update=data),
        }
    )


def exported_tokenizer(
    checkpoint: str, directory: str, length: int, requested: bool
) -> tuple[dict[str, bytes], int | None, dict[str, Any]]:
    """The tokenizer to export with a checkpoint: (file name -> content, end-of-text id, further ids for config.json).

    The files of an imported model are the very files that came with it.

    Args:
        directory: of the tokenizer, "none", or "" where the run names none.
        length: of the model's context, in tokens.
        requested: whether `directory` is the user's (--tokenizer), not the run's.

    Raises:
        FileNotFoundError, ValueError: the tokenizer is not there, or cannot be exported exactly.
    """
    kept = Path(checkpoint) / KEPT_TOKENIZER
    if not requested and kept.is_dir():  # of 0.1.0: the files themselves
        return dict(_files(str(kept / ORIGINAL if (kept / ORIGINAL).is_dir() else kept))), None, {}
    if directory == "none":
        return {}, None, {}
    there = bool(directory) and storage.exists(storage.join_address(directory, DESCRIPTION))
    if not directory or (not requested and not there):
        raise FileNotFoundError(
            f"the tokenizer of {checkpoint} is not at '{directory}'; give --tokenizer DIR, or --tokenizer none"
        )
    tokenizer = Tokenizer.load(directory)
    original = storage.join_address(directory, ORIGINAL)
    if storage.exists(original):
        return dict(_files(original)), None, tokenizer.description.token_ids
    begin = {} if tokenizer.begin_of_text is None else {"bos_token_id": tokenizer.begin_of_text}
    return tokenizer_files(tokenizer, length), tokenizer.end_of_text, begin


def _files(folder: str) -> Iterator[tuple[str, bytes]]:
    for path, _ in storage.list_files(folder, empty_ok=True):
        name = path.rsplit("/", 1)[-1]
        yield name, storage.read_bytes(storage.join_address(folder, name))
