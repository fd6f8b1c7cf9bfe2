"""What checkpoints need of a file layer. launch/ hands one in (data/storage); trainer/ knows no addresses of its own."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol


class ReadableFile(Protocol):
    """An open file that several threads read at once, each at its own offset (bytes)."""

    def read_into(self, offset: int, buffer: memoryview, /) -> int: ...
    def close(self) -> None: ...


class WritableFile(Protocol):
    """A file being written from beginning to end; `close` returns when it is durable."""

    def write(self, buffer: bytes | memoryview, /) -> object: ...
    def close(self) -> None: ...


class Store(Protocol):
    """A tree of named files on a disk or in an object store. Names are relative to `address`, with / between the parts.

    Its entries are directories that are written under `staging_name` and appear complete with `publish`.
    """

    address: str
    readers: int
    """How many reads to keep in flight."""

    @property
    def local_path(self) -> Path | None: ...  # None for an object store
    def join(self, name: str) -> str: ...  # the address of something in here
    def child(self, name: str) -> "Store": ...
    def entries(self, name: str = "") -> list[str]: ...
    def size(self, name: str) -> int: ...
    def modified(self, name: str) -> float | None: ...  # seconds, by the store's clock; None where there is no such file
    def read(self, name: str) -> bytes: ...
    def write(self, name: str, content: bytes) -> None: ...
    def open(self, name: str) -> ReadableFile: ...
    def create(self, name: str) -> WritableFile: ...
    def remove(self, name: str) -> None: ...
    def staging_name(self, name: str) -> str: ...
    def publish(self, name: str) -> None: ...
    def recover(self, prefix: str) -> None: ...  # clear away what a crash left
    def set_aside(self, name: str) -> None: ...


OpenStore = Callable[[str], Store]
"""Opens the tree at a path or an object-store address."""
