"""A directory of this computer as a tree of named files whose entries appear complete or not at all."""

import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from data.storage.addresses import join_address

SUPERSEDED = "superseded"
"""In the name of what is set aside: kept for people, found by no program."""
_WRITE_BACK_BYTES = 1 << 25
"""Bytes after which the disk is given work. The system's own habit, gigabytes in memory first, made a save of 4 GB three
times as long, and pushed the shards that training reads out of the page cache."""


class DiskReader:
    """A file that several threads read at once, each at its own offset."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDONLY)

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fill the buffer from this offset (bytes) on; the bytes read, fewer only at the end of the file."""
        done = 0
        while done < len(buffer):
            count = os.preadv(self._file, [buffer[done:]], offset + done)
            if count == 0:
                break
            done += count
        return done

    def close(self) -> None:
        os.close(self._file)


class DiskWriter:
    """A new file, written from beginning to end; durable when `close` returns."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._written = self._written_back = 0

    def write(self, buffer: bytes | memoryview) -> None:
        rest = memoryview(buffer)
        while len(rest):
            size = os.write(self._file, rest)
            self._written += size
            rest = rest[size:]
            if self._written - self._written_back >= _WRITE_BACK_BYTES:
                self._write_back()

    def _write_back(self) -> None:
        """Have the system send to the disk at once what it would gather first, and then drop it from the page cache."""
        if hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(self._file, self._written_back, self._written - self._written_back, os.POSIX_FADV_DONTNEED)
        self._written_back = self._written

    def close(self) -> None:
        try:
            os.fsync(self._file)
        finally:
            os.close(self._file)


class DiskStore:
    """A directory. A new entry is written as .NAME.partial and renamed, so that it is complete or not there."""

    readers = 3  # enough to keep a disk busy while others wait for a page or a core

    def __init__(self, address: str) -> None:
        self.address = str(address).removeprefix("file://")
        self._root = Path(self.address)

    @property
    def local_path(self) -> Path:
        """Where the files are for this computer's own system calls."""
        return self._root

    def join(self, name: str) -> str:
        """Address of a file or directory in here."""
        return join_address(self.address, name)

    def child(self, name: str) -> "DiskStore":
        """The directory of this name in here."""
        return DiskStore(self.join(name))

    def entries(self, name: str = "") -> list[str]:
        """Names directly below, sorted; empty when there is no such directory."""
        path = self._root / name
        return sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []

    def size(self, name: str) -> int:
        """Bytes of a file; raises FileNotFoundError."""
        return (self._root / name).stat().st_size

    def modified(self, name: str) -> float | None:
        """When a file was last written (seconds, by the file system's clock); None when it is not there."""
        path = self._root / name
        return path.stat().st_mtime if path.is_file() else None

    def read(self, name: str) -> bytes:
        """A whole small file; raises FileNotFoundError."""
        return (self._root / name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        """A whole small file, durable on return."""
        file = self.create(name)
        file.write(content)
        file.close()

    def open(self, name: str) -> DiskReader:
        return DiskReader(self._root / name)

    def create(self, name: str) -> DiskWriter:
        return DiskWriter(self._root / name)

    def remove(self, name: str) -> None:
        """Remove a file or a tree; a tree is renamed first, so that nothing half-removed is ever seen."""
        path = self._root / name
        if path.is_symlink() or not path.is_dir():  # of a link itself, never what it points to
            path.unlink(missing_ok=True)
            return
        if not path.name.startswith("."):
            path = path.rename(path.with_name(f".{path.name}.removed"))
        shutil.rmtree(path)

    def staging_name(self, name: str) -> str:
        """Under which name an entry is written before it is published."""
        return f".{name}.partial"

    def publish(self, name: str) -> None:
        """Make what was staged visible under its name, replacing what was there."""
        staged, final = self._root / self.staging_name(name), self._root / name
        _sync_directory(staged)
        replaced = self._root / f".{name}.replaced"
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        staged.rename(final)
        _sync_directory(self._root)
        shutil.rmtree(replaced, ignore_errors=True)

    def recover(self, prefix: str) -> None:
        """Of entries whose name begins so, remove what a crash left half-written or half-removed, and bring back what it left
        half-replaced."""
        for path in sorted(self._root.glob(f".{prefix}*.*")):
            name, state = path.name[1:].rsplit(".", 1)
            if state == "replaced" and not (self._root / name).exists():
                path.rename(self._root / name)
            elif state in ("partial", "removed", "replaced"):
                self.remove(path.name)

    def set_aside(self, name: str) -> None:
        """Take an entry out of the list without destroying it: rename it to .NAME.superseded."""
        targets = numbered_paths(self._root / f".{name}.{SUPERSEDED}")
        (self._root / name).rename(next(target for target in targets if not target.exists()))


def numbered_paths(path: Path) -> Iterator[Path]:
    """Names to choose a free one from: path, path-2, path-3, ..."""
    yield path
    for number in itertools.count(2):
        yield path.with_name(f"{path.name}-{number}")


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
