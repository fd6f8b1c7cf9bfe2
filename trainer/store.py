"""Where checkpoints lie: a directory of this computer, or an object store through pyarrow."""

import contextlib
import fcntl
import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

import pyarrow.fs

LOCK = ".lock"
"""The file (on a disk) or the folder (in an object store) that says whose a directory is."""
SUPERSEDED = "superseded"
"""What is in the name of an entry that is hidden: kept for people, found by no program."""


class Source(Protocol):
    """An open file that is read at places, by several threads at once."""

    def read_into(self, offset: int, buffer: memoryview) -> int: ...
    def close(self) -> None: ...


class Sink(Protocol):
    """A file being written from beginning to end; close() returns when it is durable."""

    def write(self, buffer: bytes | memoryview) -> None: ...
    def close(self) -> None: ...


class Store(Protocol):
    """A tree of named files. Names are relative to `address`, with / between the parts."""

    address: str
    readers: int
    """Reads in flight at once that serve a reader best."""

    def entries(self, name: str = "") -> list[str]: ...
    def size(self, name: str) -> int: ...
    def open(self, name: str) -> Source: ...
    def create(self, name: str) -> Sink: ...
    def remove(self, name: str) -> None: ...
    def staging(self, name: str) -> str: ...
    def publish(self, name: str) -> None: ...
    def recover(self) -> None: ...
    def hide(self, name: str) -> None: ...


def open_store(address: str) -> "Store":
    """The store at a path or at an address such as s3://bucket/runs/a?region=eu-west-1."""
    return Objects(address) if is_remote(address) else Disk(address)


def is_remote(address: str) -> bool:
    """Whether an address names an object store."""
    return "://" in str(address) and urlsplit(str(address)).scheme != "file"


def join(address: str, name: str) -> str:
    """The address of a name below another address; the query of an object-store address stays at its end."""
    if not is_remote(address):
        return str(Path(address) / name)
    path, mark, query = address.partition("?")
    return f"{path.rstrip('/')}/{name}{mark}{query}"


def read(store: "Store", name: str) -> bytes:
    """A whole small file."""
    buffer = bytearray(store.size(name))
    source = store.open(name)
    try:
        count = source.read_into(0, memoryview(buffer))
    finally:
        source.close()
    return bytes(buffer[:count])


def write(store: "Store", name: str, content: bytes) -> None:
    """A whole small file, durable on return."""
    sink = store.create(name)
    sink.write(content)
    sink.close()


class _DiskSource:
    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDONLY)

    def read_into(self, offset: int, buffer: memoryview) -> int:
        done = 0
        while done < len(buffer):
            count = os.preadv(self._file, [buffer[done:]], offset + done)
            if count == 0:
                break
            done += count
        return done

    def close(self) -> None:
        os.close(self._file)


_PASS_ON_BYTES = 1 << 25
"""Bytes after which the disk is given work. The system's own habit, gigabytes in memory first, made a save of 4 GB three
times as long, and pushed the shards that training reads out of the page cache."""


class _DiskSink:
    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._written = self._passed_on = 0

    def write(self, buffer: bytes | memoryview) -> None:
        rest = memoryview(buffer)
        while len(rest):
            size = os.write(self._file, rest)
            self._written += size
            rest = rest[size:]
            if self._written - self._passed_on >= _PASS_ON_BYTES:
                self._pass_on()

    def _pass_on(self) -> None:
        """Have the system send to the disk at once what it would gather first, and then forget it."""
        if hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(self._file, self._passed_on, self._written - self._passed_on, os.POSIX_FADV_DONTNEED)
        self._passed_on = self._written

    def close(self) -> None:
        try:
            os.fsync(self._file)
        finally:
            os.close(self._file)


class Disk:
    """A directory. A new entry is written as .NAME.partial and renamed, so that it is whole or not there."""

    readers = 3  # enough to keep a disk busy while others wait for a page or a core

    def __init__(self, address: str) -> None:
        self.address = str(address).removeprefix("file://")
        self._root = Path(self.address)

    def entries(self, name: str = "") -> list[str]:
        """Names directly below, sorted; empty when there is no such directory."""
        path = self._root / name
        return sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []

    def size(self, name: str) -> int:
        """Bytes of a file; raises FileNotFoundError."""
        return (self._root / name).stat().st_size

    def open(self, name: str) -> Source:
        return _DiskSource(self._root / name)

    def create(self, name: str) -> Sink:
        return _DiskSink(self._root / name)

    def remove(self, name: str) -> None:
        """Remove a file or a tree; first out of sight, so that nothing half-removed is ever seen."""
        path = self._root / name
        if not path.is_dir():
            path.unlink(missing_ok=True)
            return
        if not path.name.startswith("."):
            path = path.rename(path.with_name(f".{path.name}.removed"))
        shutil.rmtree(path)

    def staging(self, name: str) -> str:
        return f".{name}.partial"

    def publish(self, name: str) -> None:
        """Make what was staged visible under its name, replacing what was there."""
        staged, final = self._root / self.staging(name), self._root / name
        _sync_directory(staged)
        replaced = self._root / f".{name}.replaced"
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        staged.rename(final)
        _sync_directory(self._root)
        shutil.rmtree(replaced, ignore_errors=True)

    def recover(self) -> None:
        """Clear away what a crash left: half-written and half-removed entries; bring back what it left half-replaced."""
        for path in sorted(self._root.glob(".step-*.*")):
            name, why = path.name[1:].rsplit(".", 1)
            if why == "replaced" and not (self._root / name).exists():
                path.rename(self._root / name)
            elif why in ("partial", "removed", "replaced"):
                shutil.rmtree(path)

    def hide(self, name: str) -> None:
        """Take a tree out of the list without destroying it."""
        targets = numbered(self._root / f".{name}.{SUPERSEDED}")
        (self._root / name).rename(next(target for target in targets if not target.exists()))

    def same_as(self, other: "Disk") -> bool:
        """Whether both are one directory, by whatever path."""
        return self._root.resolve() == other._root.resolve()

    def lock(self, key: str = "run.dir") -> "Lock":
        """Take the directory for this process; the kernel gives it back when the process ends, however it ends.

        Args:
            key: the configuration's, for the message.

        Raises:
            ValueError: when the directory cannot be written or another process has it.
        """
        made = [path for path in (self._root, *self._root.parents) if not path.exists()]
        path = self._root / LOCK
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            new = not path.exists()
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ValueError(
                f"{key}: {self._root} cannot be written ({error.strerror}); make it writable or choose another"
            ) from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = os.pread(handle, 100, 0).decode(errors="replace").strip()
            os.close(handle)
            raise ValueError(
                f"{key}: {self._root} belongs to a run that is still going (process {owner}); "
                f"stop that run or give this one another {key}"
            ) from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), path.stat()):
                return Lock(path, handle, new, made)
        os.close(handle)  # its owner took it away with him
        return self.lock(key)


class Lock:
    """A directory that this process has."""

    def __init__(self, path: Path, handle: int, new: bool, made: list[Path]) -> None:
        self._path, self._handle, self._made = path, handle, made
        self._before = None if new else os.pread(handle, 1000, 0)
        self._write(f"{os.getpid()} on {os.uname().nodename}\n".encode())

    def _write(self, content: bytes) -> None:
        with contextlib.suppress(OSError):  # a full disk; the name of the owner is for people only
            os.ftruncate(self._handle, 0)
            os.pwrite(self._handle, content, 0)

    def give_back(self, undo: bool = False) -> None:
        """Let others have it; with `undo` leave everything as it was found."""
        if undo and self._before is not None:
            self._write(self._before)
        elif undo:
            with contextlib.suppress(OSError):  # somebody else has put something there meanwhile
                self._path.unlink()
                for path in self._made:
                    path.rmdir()
        os.close(self._handle)


def numbered(path: Path) -> Iterator[Path]:
    """Names to choose a free one from: path, path-2, path-3, ..."""
    yield path
    for number in itertools.count(2):
        yield path.with_name(f"{path.name}-{number}")


def replace_file(path: Path, content: bytes) -> None:
    """Write a file that is there as it was or as it is to be, whatever happens; a full disk leaves it as it was."""
    beside = path.with_name(f".{path.name}.new")
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class _ObjectSource:
    def __init__(self, file: pyarrow.NativeFile) -> None:
        self._file = file

    def read_into(self, offset: int, buffer: memoryview) -> int:
        content = self._file.read_at(len(buffer), offset)
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        self._file.close()


class _ObjectSink:
    def __init__(self, file: pyarrow.NativeFile) -> None:
        self._file = file

    def write(self, buffer: bytes | memoryview) -> None:
        self._file.write(buffer)

    def close(self) -> None:
        self._file.close()


class Objects:
    """A prefix of an object store. There is no rename: an entry exists once its manifest, written last, is there."""

    readers = 8  # each is a request with its own latency

    def __init__(self, address: str) -> None:
        self.address = address
        if not urlsplit(address).netloc:
            raise ValueError(f"checkpoint address {address} names no bucket; give one, as in s3://bucket/runs/a")
        try:
            self._filesystem, self._root = pyarrow.fs.FileSystem.from_uri(address)
        except (ValueError, OSError) as error:
            raise ValueError(f"checkpoint address {address} cannot be opened: {error}") from None

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}".rstrip("/")

    def entries(self, name: str = "") -> list[str]:
        """Names directly below, sorted."""
        selector = pyarrow.fs.FileSelector(self._path(name), allow_not_found=True)
        return sorted(info.base_name for info in self._filesystem.get_file_info(selector))

    def size(self, name: str) -> int:
        """Bytes of a file; raises FileNotFoundError."""
        info = self._filesystem.get_file_info(self._path(name))
        if info.type != pyarrow.fs.FileType.File:
            raise FileNotFoundError(f"{join(self.address, name)} is not there")
        return info.size

    def modified(self, name: str) -> float | None:
        """When a file was written last (seconds, by the store's own time); None when it is not there."""
        info = self._filesystem.get_file_info(self._path(name))
        return info.mtime_ns / 1e9 if info.type == pyarrow.fs.FileType.File else None

    def open(self, name: str) -> Source:
        return _ObjectSource(self._filesystem.open_input_file(self._path(name)))

    def create(self, name: str) -> Sink:
        return _ObjectSink(self._filesystem.open_output_stream(self._path(name)))

    def remove(self, name: str) -> None:
        """Remove a file or a tree; the manifest first, so that nothing half-removed is ever taken for whole."""
        path = self._path(name)
        match self._filesystem.get_file_info(path).type:
            case pyarrow.fs.FileType.File:
                self._filesystem.delete_file(path)
            case pyarrow.fs.FileType.Directory:
                if self._filesystem.get_file_info(f"{path}/manifest.json").type == pyarrow.fs.FileType.File:
                    self._filesystem.delete_file(f"{path}/manifest.json")
                self._filesystem.delete_dir(path)
            case _:
                pass

    def staging(self, name: str) -> str:
        return name

    def publish(self, name: str) -> None:
        """Nothing to do: the manifest is already there."""

    def recover(self) -> None:
        """Clear away what a crash left half-written."""
        for name in self.entries():
            if name.startswith("step-") and "manifest" not in {entry.split(".")[0] for entry in self.entries(name)}:
                self.remove(name)

    def hide(self, name: str) -> None:
        """Rename the manifest, which is what makes an entry exist."""
        self._filesystem.move(self._path(f"{name}/manifest.json"), self._path(f"{name}/manifest.{SUPERSEDED}.json"))
