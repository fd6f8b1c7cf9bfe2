"""Whole files by address (data/storage/addresses.py)."""

import json
import os
import re
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from pyarrow import fs

from data.storage.addresses import hide_login, is_remote, locate, named_errors

MAX_JSON_BYTES = 1 << 28
"""A manifest of a million shards has about as much."""
POINTER = b"version https://git-lfs.github.com/spec/"
_DRAFT = re.compile(r".+\.[0-9a-f]{32}\.partial", re.DOTALL)


def read_bytes(address: str) -> bytes:
    """The whole of a small file. Raises FileNotFoundError."""
    system, path = locate(address)
    with named_errors(address), system.open_input_file(path) as file:
        return file.read()


def read_json(address: str) -> Any:
    """The value of a JSON file, which may be a stranger's.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is too large to be one of ours, is not JSON, nests too deeply, or has a key twice in an object.
    """
    system, path = locate(address)
    with named_errors(address):
        size = system.get_file_info(path).size or 0
    if size > MAX_JSON_BYTES:
        raise ValueError(f"'{hide_login(address)}' has {size} bytes, a file of this kind has at most {MAX_JSON_BYTES}")
    try:
        return json.loads(read_bytes(address), object_pairs_hook=_without_duplicates)
    except RecursionError:
        raise ValueError(f"'{hide_login(address)}' nests more deeply than any file of this kind") from None
    except ValueError as reason:
        raise ValueError(f"'{hide_login(address)}' is not JSON ({reason})") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; raises ValueError where a key stands twice: readers would not agree on which of them holds."""
    tree = dict(pairs)
    if len(tree) != len(pairs):
        raise ValueError("a key stands twice in an object")
    return tree


def is_lfs_pointer(head: bytes) -> bool:
    """Whether a file that begins so is what Git LFS leaves in place of one that was not downloaded."""
    return head.startswith(POINTER)


def refuse_lfs_pointer(path: str | Path) -> None:
    """Raises ValueError when a local file is one."""
    with open(path, "rb") as file:
        if is_lfs_pointer(file.read(len(POINTER))):
            raise ValueError(f"{path} is a Git LFS pointer, not the file itself; run git lfs pull in its repository")


def exists(address: str) -> bool:
    """Whether a file or folder is there."""
    system, path = locate(address)
    with named_errors(address):
        return system.get_file_info(path).type != fs.FileType.NotFound


def write_atomic(address: str, content) -> None:
    """Write a file that is either complete or absent: renamed into place, or closed into an object store.

    `content` is anything with the buffer protocol (bytes, a pyarrow buffer).
    """
    system, path = locate(address)
    if is_remote(address):
        with named_errors(address), system.open_output_stream(path) as file:
            file.write(content)
        return
    with named_errors(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        # processes of several nodes may write the same file, so each has a draft of its own
        replace_file(Path(path), content, Path(f"{path}.{uuid.uuid4().hex}.partial"))  # see _DRAFT


def replace_file(path: Path, content, draft: Path | None = None) -> None:
    """Replace a local file atomically and durably; after a failure (a full disk) the old one stands.

    Args:
        content: anything with the buffer protocol.
        draft: where the content is written before it is renamed; default .NAME.new beside the file.
    """
    draft = draft or path.with_name(f".{path.name}.new")
    try:
        with open(draft, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def remove(address: str) -> None:
    """Delete a folder and all in it, as far as that is possible."""
    system, path = locate(address)
    with suppress(OSError):
        system.delete_dir(path)


def remove_drafts(address: str) -> None:
    """Delete what killed calls of `write_atomic` left in a local folder."""
    _, path = locate(address)
    if not is_remote(address):
        for draft in Path(path).glob("*.partial"):
            if _DRAFT.fullmatch(draft.name):
                draft.unlink(missing_ok=True)
