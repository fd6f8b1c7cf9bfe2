"""Which files an address means: a file, a folder, or a pattern as Python's glob reads it."""

import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from stat import S_ISDIR, S_ISREG

from pyarrow import fs

from data.storage.addresses import locate, named_errors

WILDCARDS = "*?["
ALL_BELOW = "**"
BOOKKEEPING_FILES, BOOKKEEPING_FOLDER = ("_SUCCESS", "_metadata", "_common_metadata"), "_temporary"
"""What Spark and Dask leave beside Parquet."""
LEADS_NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


@dataclass(frozen=True)
class Listing:
    """What an address means, sorted."""

    files: list[tuple[str, int]]
    """(path, size in bytes)"""
    broken_links: list[str]
    """Paths of local links that lead to no file."""


def list_files(address: str, empty_ok: bool = False) -> list[tuple[str, int]]:
    """Sorted (path, size in bytes) of the files an address means, as `list_tree` finds them.

    Raises FileNotFoundError when nothing is there, unless `empty_ok`.
    """
    files = list_tree(address).files
    if not files and not empty_ok:
        raise FileNotFoundError(f"no files at '{address}'; give a file, a folder or a pattern")
    return files


def list_tree(address: str) -> Listing:
    """The files an address means: a file, a folder (all below it, links followed), or a pattern of files.

    Hidden files and the bookkeeping of Spark and Dask are left out of folders. In a pattern `**` stands for any number of
    folders, and a part matches hidden names only if it begins with a dot.
    Raises ValueError for a name that is not UTF-8, OSError for a folder that cannot be listed.
    """
    pattern: list[str] = []
    if _is_pattern(address):
        address, pattern = _split_pattern(address)
    system, path = locate(address)
    _refuse_foreign_name(path)
    with named_errors(address):
        info = system.get_file_info(path)
        if info.type == fs.FileType.File and not pattern:
            return Listing([(path, info.size)], [])
        wanted = pattern or [ALL_BELOW]
        if not isinstance(system, fs.LocalFileSystem):
            found = _matching_objects(system, path, wanted)
        else:
            found = _matching_files(path, (), wanted) if info.type != fs.FileType.NotFound else []
        return _listing(path, found if pattern else (entry for entry in found if not _is_bookkeeping(entry[0])))


Entry = tuple[tuple[str, ...], int | None]
"""Names below the folder that is listed, and the size in bytes; None for a link that leads to no file."""


def _listing(folder: str, found: Iterable[Entry]) -> Listing:
    listing = Listing([], [])
    for names, size in sorted(found, key=lambda entry: "/".join(entry[0])):
        _refuse_foreign_name(folder, "/".join(names))
        path = "/".join((folder.rstrip("/"), *names) if folder else names)  # of objects some names may be empty
        if size is None:
            listing.broken_links.append(path)
        else:
            listing.files.append((path, size))
    return listing


def _matching_objects(system: fs.FileSystem, folder: str, pattern: list[str]) -> Iterator[Entry]:
    for info in system.get_file_info(fs.FileSelector(folder, allow_not_found=True, recursive=True)):
        names = tuple(info.path[len(folder) :].strip("/").split("/"))
        if info.type == fs.FileType.File and _matches(names, pattern):
            yield names, info.size


def _matching_files(
    folder: str, names: tuple[str, ...], pattern: list[str], above: frozenset[tuple[int, int]] = frozenset()
) -> Iterator[Entry]:  # fmt: skip
    """Entries of a local folder, from those of `names` below it on. A link to a folder that it lies in is not followed."""
    here = os.path.join(folder, *names)
    status = os.stat(here)
    if (status.st_dev, status.st_ino) in above:
        return
    above |= {(status.st_dev, status.st_ino)}
    with os.scandir(here) as entries:
        for entry in entries:
            below = (*names, entry.name)
            try:
                status = entry.stat()
            except OSError as reason:
                if reason.errno not in LEADS_NOWHERE:
                    raise
                if entry.is_symlink() and _matches(below, pattern):
                    yield below, None
                continue
            if S_ISDIR(status.st_mode) and _matches(below, pattern, whole=False):
                yield from _matching_files(folder, below, pattern, above)
            elif S_ISREG(status.st_mode) and _matches(below, pattern):
                yield below, status.st_size


def _matches(names: Sequence[str], pattern: list[str], whole: bool = True) -> bool:
    """Whether names match the parts of a pattern; with `whole` false: whether names that begin so may."""
    if not names or not pattern:
        return not names and (not whole or not pattern)
    first, rest = pattern[0], pattern[1:]
    if names[0].startswith(".") and not first.startswith("."):
        return first == ALL_BELOW and _matches(names, rest, whole)
    if first == ALL_BELOW:
        is_file = whole and len(names) == 1
        return _matches(names, rest, whole) or (not rest if is_file else _matches(names[1:], pattern, whole))
    return fnmatchcase(names[0], first) and _matches(names[1:], rest, whole)


def _is_bookkeeping(names: tuple[str, ...]) -> bool:
    return names[-1] in BOOKKEEPING_FILES or BOOKKEEPING_FOLDER in names[:-1]


def _refuse_foreign_name(path: str, below: str = "") -> None:
    """Raises ValueError for a name that is not UTF-8, which Arrow opens no file by."""
    try:
        path.encode()
        below.encode()
    except UnicodeEncodeError:
        where = f"'{path}' holds {below!a}" if below else ascii(path)
        raise ValueError(f"{where}: this name is not UTF-8; rename it") from None


def _is_pattern(address: str) -> bool:
    """Whether there is a wildcard in an address, and no local file or folder of that very name."""
    _, is_uri, rest = address.partition("://")
    body = rest.partition("?")[0] if is_uri else address
    return any(sign in body for sign in WILDCARDS) and bool(is_uri or not Path(address).exists())


def _split_pattern(address: str) -> tuple[str, list[str]]:
    """The folder before the first wildcard (with the URI's query kept) and the parts of the pattern below it."""
    body, mark, query = address, "", ""
    if "://" in address and (at := address.find("?", address.rfind("/"))) >= 0 and "=" in address[at:]:
        body, mark, query = address[:at], "?", address[at + 1 :]
    parts = body.split("/")
    first = next(i for i, part in enumerate(parts) if any(sign in part for sign in WILDCARDS))
    return ("/".join(parts[:first]) or ("/" if first else ".")) + mark + query, parts[first:]
