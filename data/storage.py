"""Files by address: a local path, or an object store through pyarrow.fs (`s3://bucket/key`, `gs://bucket/key`)."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path

from pyarrow import fs

WILDCARDS = "*?["
OUTAGES = ("AWS Error", "google::cloud", "curlCode")
"""Words of the libraries behind pyarrow when a store, and not a file, is at fault."""
POINTER = b"version https://git-lfs.github.com/spec/"
BOOKKEEPING = ("_SUCCESS", "_metadata", "_common_metadata", "_temporary")  # what Spark and Dask leave beside Parquet


def locate(address: str) -> tuple[fs.FileSystem, str]:
    """File system and path behind an address.

    An object store is named by a URI that pyarrow understands; its options stand in the query, for example
    `s3://bucket/folder?endpoint_override=http://127.0.0.1:9000`. Credentials come from where the store's own
    tools keep them. Raises ValueError for an address that names no known file system.
    """
    if "://" not in address:
        return fs.LocalFileSystem(), str(Path(address).expanduser().absolute())
    try:
        system, path = fs.FileSystem.from_uri(address)
    except (ValueError, OSError) as reason:
        raise ValueError(
            f"cannot open the address '{hide_login(address)}': {reason}; write a local path or a URI such as s3://bucket/folder"
        ) from reason
    return system, path.rstrip("/")


def is_local(system: fs.FileSystem) -> bool:
    """Whether files of this system can be renamed and memory-mapped."""
    return isinstance(system, fs.LocalFileSystem)


def join(address: str, *names: str) -> str:
    """Address of a file below an address; the query of a URI stays at its end."""
    head, mark, query = address.partition("?") if "://" in address else (address, "", "")
    return "/".join([head.rstrip("/"), *names]) + mark + query


def list_files(address: str, empty_ok: bool = False) -> list[tuple[str, int]]:
    """Sorted (path, size in bytes) of the files an address means: a file, a folder (all below it), or a pattern.

    Hidden files and the bookkeeping of Spark and Dask are left out of folders.
    Raises FileNotFoundError when nothing is there, unless `empty_ok`.
    """
    _, mark, rest = address.partition("://")
    if not mark:
        rest = address
    pattern = ""
    if any(sign in rest.partition("?")[0] for sign in WILDCARDS) and not (not mark and Path(address).exists()):
        address, pattern = _split_pattern(address)
    system, path = locate(address)
    with naming(address):
        info = system.get_file_info(path)
        if info.type == fs.FileType.File:
            return [(path, info.size)]
        found = system.get_file_info(fs.FileSelector(path, allow_not_found=True, recursive=True))
    wanted = f"{path}/{pattern}" if pattern else ""
    files = [(f.path, f.size) for f in found if f.type == fs.FileType.File and _is_wanted(f.path, path, wanted)]
    if not files and not empty_ok:
        raise FileNotFoundError(f"no files at '{address}{pattern and '/' + pattern}'; give a file, a folder or a pattern")
    return sorted(files)


def _is_wanted(file: str, folder: str, pattern: str) -> bool:
    if pattern:
        return (fnmatch(file, pattern) and file.count("/") == pattern.count("/")) or (
            "**" in pattern and fnmatch(file, pattern)
        )
    below = file[len(folder) :].strip("/").split("/")
    return not any(part.startswith((".", *BOOKKEEPING)) for part in below)


def _split_pattern(address: str) -> tuple[str, str]:
    """The folder before the first wildcard (with the URI's query kept) and the pattern below it."""
    body, mark, query = address, "", ""
    if "://" in address and (at := address.find("?", address.rfind("/"))) >= 0 and "=" in address[at:]:
        body, mark, query = address[:at], "?", address[at + 1 :]
    parts = body.split("/")
    first = next(i for i, part in enumerate(parts) if any(sign in part for sign in WILDCARDS))
    return "/".join(parts[:first]) + mark + query or ".", "/".join(parts[first:])


@contextmanager
def naming(address: str) -> Iterator[None]:
    """An error of the system or of an object store in here says which address it is about."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            raise OSError(error.errno, os.strerror(error.errno), error.filename or address) from error
        stop_at_outage(address, error)
        raise type(error)(f"'{hide_login(address)}': {_line(error)}") from error


def stop_at_outage(address: str, error: Exception) -> None:
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


def read_bytes(address: str) -> bytes:
    """The whole of a small file. Raises FileNotFoundError."""
    system, path = locate(address)
    with naming(address), system.open_input_file(path) as file:
        return file.read()


def refuse_pointer(path: str | Path) -> None:
    """Raises ValueError when a local file is what Git LFS leaves in place of one that was not downloaded."""
    with open(path, "rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise ValueError(f"{path} is a Git LFS pointer, not the file itself; run git lfs pull in its repository")


def exists(address: str) -> bool:
    """Whether a file or folder is there."""
    system, path = locate(address)
    with naming(address):
        return system.get_file_info(path).type != fs.FileType.NotFound


def write_whole(address: str, content) -> None:
    """Write a file that is either complete or absent: renamed into place, or closed into an object store.

    `content` is anything with the buffer protocol (bytes, a pyarrow buffer).
    """
    system, path = locate(address)
    if not is_local(system):
        with naming(address), system.open_output_stream(path) as file:
            file.write(content)
        return
    draft = f"{path}.{uuid.uuid4().hex}.partial"
    with naming(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(draft, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, path)
        except BaseException:
            Path(draft).unlink(missing_ok=True)
            raise


def remove(address: str) -> None:
    """Delete a folder and all in it, as far as that is possible."""
    system, path = locate(address)
    with suppress(OSError):
        system.delete_dir(path)


def remove_drafts(address: str) -> None:
    """Delete what a killed writer left below a local folder."""
    system, path = locate(address)
    if is_local(system):
        for draft in Path(path).rglob("*.partial"):
            draft.unlink(missing_ok=True)


def reopen(address: str, path: str) -> str:
    """Address of a file that `list_files(address)` found."""
    if "://" not in address:
        return path
    scheme, _, rest = address.partition("://")
    body, mark, query = rest.rpartition("?")
    query = f"?{query}" if mark and "=" in query else ""
    host = (body if query else rest).split("/", 1)[0]
    login, at, _ = host.rpartition("@")
    return f"{scheme}://{host if path.startswith('/') else login + at}{path}{query}"
