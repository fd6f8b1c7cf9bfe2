"""Which run may write to an object-store directory: one, and a killed one gives it back.

Object stores have no locks. Whoever wants a directory writes an object of its own into DIRECTORY/.lock and renews it as
long as it lives; then it looks who else is there. Stores list what was written before (S3 since 2020), so of two runs the
later to look sees the other, and at most one finds itself alone. All ages are differences of the store's own times.
"""

import contextlib
import json
import os
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from trainer.store import LOCK, Objects, read, write

RENEW_SECONDS = 10.0
SILENT_SECONDS = 60.0
"""Without a renewal for this long a run counts as dead: well above any pause of a store or a process."""


class Lease:
    """A run's right to one object-store directory.

    Args:
        local: The lock file of the run's own directory, which this process holds locked (trainer/store.py). An earlier
            owner of the same file on the same boot of this computer is dead, since the kernel gave the file to us.
        report: Takes one sentence for the log.
    """

    def __init__(self, store: Objects, local: Path, report: Callable[[str], None]) -> None:
        self._store, self._report = store, report
        self._name = f"{LOCK}/{uuid.uuid4().hex}"
        status = local.stat()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        self._record = {
            "owner": f"process {os.getpid()} on {os.uname().nodename}, {local.parent}",
            "lock_file": f"{boot}:{status.st_dev}:{status.st_ino}",
        }
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def take(self) -> None:
        """Take the directory; waits for a sign of life from an owner that has not given it back.

        Raises:
            ValueError: it cannot be written, or another run has it.
        """
        try:
            self._write()
            first = self._others()
            waited = False
            while others := {name: at for name, at in self._others().items() if not self._is_dead(name, at)}:
                alive = next((name for name, at in others.items() if at > first.setdefault(name, at)), None)
                if alive is not None:
                    owner = self._read(alive)["owner"]
                    self._store.remove(self._name)
                    raise ValueError(
                        f"checkpoint.directory {self._store.address} belongs to a run that is still going ({owner}); "
                        "stop that run or give this one another checkpoint.directory"
                    )
                if not waited:
                    self._report(
                        f"checkpoint.directory {self._store.address} was not given back by its last run; "
                        f"waiting up to {SILENT_SECONDS:.0f} s for a sign of life"
                    )
                waited = True
                time.sleep(RENEW_SECONDS / 4)
                self._write()
        except OSError as error:
            raise ValueError(
                f"checkpoint.directory {self._store.address} cannot be written ({str(error).splitlines()[0]}); "
                "make it writable or choose another"
            ) from None
        self._thread.start()

    def held(self) -> bool:
        """Whether the directory is still this run's: one that was silent for too long may have lost it."""
        return self._store.modified(self._name) is not None

    def give_back(self) -> None:
        """Let the next run have the directory at once."""
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):  # then the next run waits
            self._store.remove(self._name)

    def _keep(self) -> None:
        """Renew until given back or lost. A store that does not answer is asked again the next time."""
        while not self._ended.wait(RENEW_SECONDS):
            try:
                if not self.held():
                    return
                self._write()
            except OSError:
                continue

    def _write(self) -> None:
        write(self._store, self._name, json.dumps(self._record).encode())

    def _others(self) -> dict[str, float]:
        """Everybody else's objects and when they were last renewed (seconds, the store's time)."""
        names = [f"{LOCK}/{entry}" for entry in self._store.entries(LOCK)]
        times = {name: self._store.modified(name) for name in names if name != self._name}
        return {name: at for name, at in times.items() if at is not None}

    def _is_dead(self, name: str, renewed: float) -> bool:
        """Whether an object's run is gone; then the object goes too."""
        now = self._store.modified(self._name) or renewed
        dead = now - renewed > SILENT_SECONDS or self._read(name)["lock_file"] == self._record["lock_file"]
        if dead:
            self._store.remove(name)
        return dead

    def _read(self, name: str) -> dict[str, str]:
        """What an object says; nothing of one that was given back meanwhile."""
        try:
            return json.loads(read(self._store, name))
        except (OSError, ValueError):
            return {"owner": "unknown", "lock_file": ""}
