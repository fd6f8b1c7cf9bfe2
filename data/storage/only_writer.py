"""One process at a time writes to a directory of a disk."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data.storage.addresses import is_remote, locate, named_errors

_LOCK_FILE = ".lock"


@contextmanager
def only_writer(address: str, option: str) -> Iterator[None]:
    """Hold a directory, which is made if need be, against other processes, also of other nodes that share the disk.

    The kernel releases it when the process ends, however it ends. An object store has no locks and is not held.

    Args:
        option: names the directory, for the sentence.

    Raises:
        ValueError: another process holds it.
        OSError: it cannot be written.
    """
    if is_remote(address):
        yield
        return
    directory = Path(locate(address)[1])
    with named_errors(str(directory)):
        directory.mkdir(parents=True, exist_ok=True)
        handle = _locked(directory / _LOCK_FILE, f"{option} '{address}'")
    try:
        yield
    finally:
        with suppress(OSError):
            (directory / _LOCK_FILE).unlink()
        os.close(handle)


def _locked(path: Path, what: str) -> int:
    """The open lock file. Its last owner may remove it at any moment until it is locked."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(handle, 100, 0).decode(errors="replace").strip()
            os.close(handle)
            raise ValueError(
                f"{what} is being written by another command (process {owner}): wait for it, or choose another"
            ) from None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), path.stat()):
                with suppress(OSError):  # a full disk; the name is for people only
                    os.ftruncate(handle, 0)
                    os.pwrite(handle, f"{os.getpid()} on {os.uname().nodename}\n".encode(), 0)
                return handle
        os.close(handle)
