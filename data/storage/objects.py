"""A prefix of an object store as a tree of named files (the interface of data/storage/disk.py), through pyarrow."""

from urllib.parse import urlsplit

from pyarrow import NativeFile, fs

from data.storage.addresses import join_address, locate
from data.storage.disk import SUPERSEDED

LAST_FILE = "manifest.json"
"""The file of an entry that is written last: the entry exists once it is there."""


class ObjectReader:
    """An object that several threads read at once, each at its own offset."""

    def __init__(self, file: NativeFile) -> None:
        self._file = file

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fill the buffer from this offset (bytes) on; the bytes read, fewer only at the end of the file."""
        content = self._file.read_at(len(buffer), offset)
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        self._file.close()


class ObjectStore:
    """A prefix of an object store. There is no rename: an entry exists once its manifest, written last, is there."""

    readers = 8  # each is a request with its own latency
    local_path = None  # no system call reaches an object

    def __init__(self, address: str) -> None:
        self.address = address
        if not urlsplit(address).netloc:
            raise ValueError(f"the address {address} names no bucket; give one, as in s3://bucket/runs/a")
        self._filesystem, self._root = locate(address)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}".rstrip("/")

    def join(self, name: str) -> str:
        """Address of a file or prefix in here."""
        return join_address(self.address, name)

    def child(self, name: str) -> "ObjectStore":
        """The prefix of this name in here."""
        return ObjectStore(self.join(name))

    def entries(self, name: str = "") -> list[str]:
        """Names directly below, sorted."""
        selector = fs.FileSelector(self._path(name), allow_not_found=True)
        return sorted(info.base_name for info in self._filesystem.get_file_info(selector))

    def size(self, name: str) -> int:
        """Bytes of a file; raises FileNotFoundError."""
        info = self._filesystem.get_file_info(self._path(name))
        if info.type != fs.FileType.File:
            raise FileNotFoundError(f"{self.join(name)} is not there")
        return info.size

    def modified(self, name: str) -> float | None:
        """When a file was last written (seconds, by the store's clock); None when it is not there."""
        info = self._filesystem.get_file_info(self._path(name))
        return info.mtime_ns / 1e9 if info.type == fs.FileType.File else None

    def read(self, name: str) -> bytes:
        """A whole small file; raises FileNotFoundError."""
        with self._filesystem.open_input_file(self._path(name)) as file:
            return file.read()

    def write(self, name: str, content: bytes) -> None:
        """A whole small file, durable on return."""
        file = self.create(name)
        file.write(content)
        file.close()

    def open(self, name: str) -> ObjectReader:
        return ObjectReader(self._filesystem.open_input_file(self._path(name)))

    def create(self, name: str) -> NativeFile:
        return self._filesystem.open_output_stream(self._path(name))

    def remove(self, name: str) -> None:
        """Remove a file or a tree; the manifest first, so that nothing half-removed is ever taken for complete."""
        path = self._path(name)
        match self._filesystem.get_file_info(path).type:
            case fs.FileType.File:
                self._filesystem.delete_file(path)
            case fs.FileType.Directory:
                if self._filesystem.get_file_info(f"{path}/{LAST_FILE}").type == fs.FileType.File:
                    self._filesystem.delete_file(f"{path}/{LAST_FILE}")
                self._filesystem.delete_dir(path)
            case _:
                pass

    def staging_name(self, name: str) -> str:
        """Under which name an entry is written: its own."""
        return name

    def publish(self, name: str) -> None:
        """Nothing to do: the manifest is already there."""

    def recover(self, prefix: str) -> None:
        """Of entries whose name begins so, remove what a crash left half-written: those without a manifest."""
        stem, _, _ = LAST_FILE.partition(".")
        for name in self.entries():
            if name.startswith(prefix) and stem not in {entry.partition(".")[0] for entry in self.entries(name)}:
                self.remove(name)

    def set_aside(self, name: str) -> None:
        """Take an entry out of the list without destroying it: rename its manifest, which is what makes it exist."""
        stem, _, ending = LAST_FILE.partition(".")
        self._filesystem.move(self._path(f"{name}/{LAST_FILE}"), self._path(f"{name}/{stem}.{SUPERSEDED}.{ending}"))
