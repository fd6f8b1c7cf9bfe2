"""Addresses of files: a local path, or a URI of an object store that pyarrow.fs understands (`s3://bucket/key`)."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from pyarrow import fs

OUTAGES = ("AWS Error", "google::cloud", "curlCode")
"""Words of the libraries behind pyarrow when a store, and not a file, is at fault."""


def is_remote(address: str | Path) -> bool:
    """Whether an address names an object store. Files of all others can be renamed, locked and memory-mapped."""
    return "://" in str(address) and urlsplit(str(address)).scheme != "file"


def locate(address: str) -> tuple[fs.FileSystem, str]:
    """File system and path behind an address.

    An object store is named by a URI that pyarrow understands; its options stand in the query, for example
    `s3://bucket/folder?endpoint_override=http://127.0.0.1:9000`. Credentials come from where the store's own
    tools keep them. Raises ValueError for an address that is empty or names no known file system.
    """
    if "://" not in address:
        return fs.LocalFileSystem(), absolute_path(address)
    try:
        system, path = fs.FileSystem.from_uri(address)
    except (ValueError, OSError) as reason:
        raise ValueError(
            f"cannot open the address '{hide_login(address)}': {reason}; write a local path or a URI such as s3://bucket/folder"
        ) from reason
    return system, path.rstrip("/")


def absolute_path(path: str) -> str:
    """The one spelling of a local path: from the root, without ~, `.` and `..`.

    A `..` behind a link means what it means to the system, the parent of what the link points to. Other links keep their names:
    the Hugging Face cache consists of them. Raises ValueError for an empty path.
    """
    _refuse_empty(path)
    found = "/"
    for name in os.path.join(os.getcwd(), os.path.expanduser(path)).split("/"):
        if name == "..":
            found = os.path.dirname(os.path.realpath(found) if os.path.islink(found) else found)
        elif name not in ("", "."):
            found = os.path.join(found, name)
    return found


def _refuse_empty(address: str) -> None:
    """Raises ValueError: an empty path would mean the working directory, or the root where a name is joined to it."""
    if not address:
        raise ValueError("an address is empty: name a file or a directory, '.' for the working directory")


def join_address(address: str, *names: str) -> str:
    """Address of a file below an address; the query of a URI stays at its end. Raises ValueError for an empty address."""
    _refuse_empty(address)
    head, mark, query = address.partition("?") if "://" in address else (address, "", "")
    return "/".join([head.rstrip("/"), *names]) + mark + query


def inside(address: str, name: object, named_by: str) -> str:
    """Address of a file below an address, by a name that a file gives, which may be a stranger's. A link there is followed: the
    Hugging Face cache consists of them.

    Args:
        named_by: the file that gives the name, for the sentence.

    Raises:
        ValueError: when the name is no relative path, or leads out of the directory.
    """
    text = name if isinstance(name, str) else ""
    parts = text.split("/")
    if not text.isprintable() or any(part in ("", ".", "..") for part in parts) or any(sign in text for sign in "\\:?#"):
        shown = ascii(name)[:100]
        raise ValueError(f"{named_by} names the file {shown}, wanted a relative path inside its directory; do not use it")
    return join_address(address, *parts)


@contextmanager
def named_errors(address: str) -> Iterator[None]:
    """An error of the system or of an object store in here says which address it is about."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            raise OSError(error.errno, os.strerror(error.errno), error.filename or address) from error
        raise_outage(address, error)
        raise type(error)(f"'{hide_login(address)}': {_line(error)}") from error


def raise_outage(address: str, error: Exception) -> None:
    """Raises OSError when an error says that an object store does not answer: of the file it says nothing."""
    if isinstance(error, OSError) and any(name in str(error) for name in OUTAGES):
        raise OSError(
            f"'{hide_login(address)}' cannot be used ({_line(error)}); "
            "check the address, the credentials and that the store answers"
        ) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split("\n")).strip()


def hide_login(address: str) -> str:
    """An address without the key and secret that it may hold, for a screen or a log."""
    scheme, mark, rest = address.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{mark}{host.rpartition('@')[2]}{slash}{path}" if mark else address


def listed_address(address: str, path: str) -> str:
    """Address of a file that `list_files(address)` found."""
    if "://" not in address:
        return path
    scheme, _, rest = address.partition("://")
    body, mark, query = rest.rpartition("?")
    query = f"?{query}" if mark and "=" in query else ""
    host = (body if query else rest).split("/", 1)[0]
    login, at, _ = host.rpartition("@")
    return f"{scheme}://{host if path.startswith('/') else login + at}{path}{query}"
