"""Which run may write to a directory: one at a time.

A run locks its own directory (RUN/checkpoints, always on a disk) and, where checkpoint.directory is another, that one too.

On a disk (`FileLock`) the run opens DIRECTORY/.lock, writes "PID on HOST" into it for people, and holds it with flock. The
kernel releases it when the process ends, however it ends; the file stays.

In an object store (`ObjectLock`), which has no locks:
- Each run that wants the directory writes an object of its own, DIRECTORY/.lock/<random>: JSON with `owner` (process, host,
  run directory, for people) and `lock_file` (boot, device and inode of the .lock file that the run holds on its disk).
- It then lists DIRECTORY/.lock. Stores list what was written before (S3 since 2020), so of two runs the later one to list sees
  the other, and at most one finds itself alone: that one has the lock. Of two that start together both may be refused.
- The owner rewrites its object every RENEW_SECONDS. Another run that sees it rewritten is refused.
- An owner counts as dead when it has not rewritten its object for SILENT_SECONDS, or when its `lock_file` is the very one that
  the newcomer holds, since the kernel gave that to the newcomer. The newcomer then deletes the dead owner's object.
- A killed run leaves its object. Started again in its run directory on the same boot of the same computer, it acquires the lock
  at once; any other run waits until the object is SILENT_SECONDS old.
- An owner that finds its own object deleted has lost the lock and writes nothing more (`held`).
All ages are differences of the store's own times.
"""

import contextlib
import fcntl
import json
import os
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from trainer.checkpoint.store import Store

LOCK = ".lock"
"""The file (on a disk) or the prefix (in an object store) that says who owns a directory."""
RENEW_SECONDS = 10.0
SILENT_SECONDS = 60.0
"""Well above any pause of a store or a process."""


class FileLock:
    """The lock of a directory on a disk.

    Args:
        key: of the configuration that names the directory, for messages.
    """

    def __init__(self, directory: Path, key: str = "run.dir") -> None:
        self._directory, self._key, self._path = directory, key, directory / LOCK
        self._handle = -1
        self._content_before: bytes | None = None
        """Of the lock file; None where there was none."""
        self._made: list[Path] = []
        """Directories that did not exist, innermost first."""

    def acquire(self) -> None:
        """Lock the directory, which is made if need be.

        Raises:
            ValueError: it cannot be written, or another process holds the lock.
        """
        self._made = [path for path in (self._directory, *self._directory.parents) if not path.exists()]
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            existed = self._path.exists()
            self._handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ValueError(
                f"{self._key}: {self._directory} cannot be written ({error.strerror}); make it writable or choose another"
            ) from None
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = os.pread(self._handle, 100, 0).decode(errors="replace").strip()
            os.close(self._handle)
            raise ValueError(
                f"{self._key}: {self._directory} belongs to a run that is still going (process {owner}); "
                f"stop that run or give this one another {self._key}"
            ) from None
        if not self._is_current():  # its last owner has removed the file meanwhile
            os.close(self._handle)
            return self.acquire()
        self._content_before = os.pread(self._handle, 1000, 0) if existed else None
        self._write(f"{os.getpid()} on {os.uname().nodename}\n".encode())

    def _is_current(self) -> bool:
        """Whether the file that this process has locked is still the lock file of the directory."""
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self._handle), self._path.stat())
        return False

    def release(self, undo: bool = False) -> None:
        """Let others have the directory; with `undo` leave everything as it was found."""
        if undo and self._content_before is not None:
            self._write(self._content_before)
        elif undo:
            with contextlib.suppress(OSError):  # somebody else has put something there meanwhile
                self._path.unlink()
                for path in self._made:
                    path.rmdir()
        os.close(self._handle)

    def _write(self, content: bytes) -> None:
        with contextlib.suppress(OSError):  # a full disk; the name of the owner is for people only
            os.ftruncate(self._handle, 0)
            os.pwrite(self._handle, content, 0)


class ObjectLock:
    """The lock of a directory in an object store.

    Args:
        lock_file: of the run's own directory, which this process holds.
        report: Takes one sentence for the log.
    """

    def __init__(self, store: Store, lock_file: Path, report: Callable[[str], None]) -> None:
        self._store, self._report = store, report
        self._name = f"{LOCK}/{uuid.uuid4().hex}"
        status = lock_file.stat()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        self._record = {
            "owner": f"process {os.getpid()} on {os.uname().nodename}, {lock_file.parent}",
            "lock_file": f"{boot}:{status.st_dev}:{status.st_ino}",
        }
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._keep_renewing, name="checkpoint lock", daemon=True)

    def acquire(self) -> None:
        """Lock the directory; waits where the last owner may be dead, until it counts as such.

        Raises:
            ValueError: it cannot be written, or another run holds the lock.
        """
        try:
            self._renew()
            first_seen = self._others()
            waited = False
            while others := {name: at for name, at in self._others().items() if not self._remove_if_dead(name, at)}:
                alive = next((name for name, at in others.items() if at > first_seen.setdefault(name, at)), None)
                if alive is not None:
                    owner = self._read(alive)["owner"]
                    self._store.remove(self._name)
                    raise ValueError(
                        f"checkpoint.directory {self._store.address} belongs to a run that is still going ({owner}); "
                        "stop that run or give this one another checkpoint.directory"
                    )
                if not waited:
                    self._report(
                        f"checkpoint.directory {self._store.address} is still locked by its last run; "
                        f"waiting up to {SILENT_SECONDS:.0f} s to see whether that run is alive"
                    )
                waited = True
                time.sleep(RENEW_SECONDS / 4)
                self._renew()
        except OSError as error:
            raise ValueError(
                f"checkpoint.directory {self._store.address} cannot be written ({str(error).splitlines()[0]}); "
                "make it writable or choose another"
            ) from None
        self._thread.start()

    def held(self) -> bool:
        """Whether the lock is still this run's: one that did not renew it for too long may have lost it."""
        return self._store.modified(self._name) is not None

    def release(self, undo: bool = False) -> None:
        """Let the next run have the directory at once."""
        self._released.set()
        self._thread.join()
        with contextlib.suppress(OSError):  # then the next run waits
            self._store.remove(self._name)

    def _keep_renewing(self) -> None:
        """Renew until released or lost. A store that does not answer is asked again the next time."""
        while not self._released.wait(RENEW_SECONDS):
            try:
                if not self.held():
                    return
                self._renew()
            except OSError:
                continue

    def _renew(self) -> None:
        self._store.write(self._name, json.dumps(self._record).encode())

    def _others(self) -> dict[str, float]:
        """The objects of all other runs and when they were last renewed (seconds, the store's time)."""
        names = [f"{LOCK}/{entry}" for entry in self._store.entries(LOCK)]
        times = {name: self._store.modified(name) for name in names if name != self._name}
        return {name: at for name, at in times.items() if at is not None}

    def _remove_if_dead(self, name: str, renewed: float) -> bool:
        """Whether the owner of an object counts as dead; then the object is removed."""
        now = self._store.modified(self._name) or renewed
        dead = now - renewed > SILENT_SECONDS or self._read(name)["lock_file"] == self._record["lock_file"]
        if dead:
            self._store.remove(name)
        return dead

    def _read(self, name: str) -> dict[str, str]:
        """What an object says; nothing of one that was removed meanwhile."""
        try:
            return json.loads(self._store.read(name))
        except (OSError, ValueError):
            return {"owner": "unknown", "lock_file": ""}


class RunLock:
    """All that a run locks: its own directory, and the directory of its checkpoints where that is another one.

    Args:
        directory: the run's own directory of checkpoints.
        store: where its checkpoints go.
        report: Takes one sentence for the log.
    """

    def __init__(self, directory: Path, store: Store, report: Callable[[str], None]) -> None:
        self._directory, self._store, self._report = directory, store, report
        self._acquired: list[FileLock | ObjectLock] = []

    def acquire(self) -> None:
        """Raises ValueError, one sentence, when one of the directories cannot be written or is locked by another run."""
        try:
            self._acquire(FileLock(self._directory))
            shared = self._store.local_path
            if shared is None:
                self._acquire(ObjectLock(self._store, self._directory / LOCK, self._report))
            elif shared.resolve() != self._directory.resolve():
                self._acquire(FileLock(shared, "checkpoint.directory"))
        except (ValueError, OSError):
            self.release(undo=True)
            raise

    def _acquire(self, lock: FileLock | ObjectLock) -> None:
        lock.acquire()
        self._acquired.append(lock)

    def held(self) -> bool:
        """Whether the directories are still this run's: flock is never lost. Raises OSError when a store does not answer."""
        return all(lock.held() for lock in self._acquired if isinstance(lock, ObjectLock))

    def release(self, undo: bool) -> None:
        """Let the next run have the directories; with `undo` leave them as they were found."""
        while self._acquired:
            self._acquired.pop().release(undo)
