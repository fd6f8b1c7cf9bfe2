"""metrics.jsonl as it is written: whole lines, and none is lost to a full disk."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainer.monitoring.records import FILE_NAME, ReplaceFile, json_safe, truncate_records


class JsonLines:
    """metrics.jsonl. Python writes the shortest digits that read back to the same float, so nothing is rounded.

    Unbuffered: a killed run has every finished line on disk. What a full disk refuses is kept in memory and written with the
    next record; so is a truncation.
    """

    retries = True
    afterwards = "the records wait in memory until it can be"

    def __init__(self, path: Path, say: Callable[[str], None], replace_file: ReplaceFile) -> None:
        self.name, self._say = str(path), say
        self._replace_file = replace_file
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (open as long as the run)
        self._pending: list[tuple[int, bytes]] = []  # step and line
        self._truncate_to: int | None = None

    def record(self, record: dict[str, Any]) -> None:
        line = json.dumps(json_safe(record), ensure_ascii=False, allow_nan=False).encode() + b"\n"
        self._pending.append((record.get("step", 0), line))
        self.flush()

    def text(self, name: str, text: str, step: int) -> None:
        self.record({"kind": "text", "step": step, "name": name, "text": text})

    def truncate(self, step: int) -> None:
        self._pending = [(at, line) for at, line in self._pending if at <= step]
        self._truncate_to = step if self._truncate_to is None else min(step, self._truncate_to)
        self.flush()

    def flush(self) -> None:
        if self._truncate_to is not None:
            truncate_records(Path(self.name), self._truncate_to, self._replace_file)
            self._file.close()
            self._file = open(self.name, "ab", buffering=0)  # noqa: SIM115
            self._truncate_to = None
        elif self._removed():
            removed, self._file = self._file, open(self.name, "ab", buffering=0)  # noqa: SIM115
            removed.close()
            self._say(f"metrics: {self.name} was removed during the run; a new one begins with this record")
        while self._pending:
            self._write(self._pending[0][1])
            self._pending.pop(0)

    def _removed(self) -> bool:
        """Whether the open file is no longer the one under its name."""
        with suppress(FileNotFoundError):
            return not os.path.samestat(os.fstat(self._file.fileno()), os.stat(self.name))
        return True

    def _write(self, line: bytes) -> None:
        """Write a whole line, or nothing of it: another process may append meanwhile."""
        before = os.fstat(self._file.fileno()).st_size
        written = 0
        try:
            while written < len(line):
                written += self._file.write(line[written:])
        except OSError:
            if written:
                self._file.truncate(before)
            raise

    def rescue(self) -> str:
        """Write the pending records to a file in the temporary directory; the end of a message that says so."""
        if not self._pending or self._truncate_to is not None:
            return ""
        path = _rescue_path(Path(self.name))
        try:
            path.write_bytes(b"".join(line for _, line in self._pending))
        except OSError as error:
            return f"; they are lost ({error.strerror})"
        message = f"; {len(self._pending)} are in {path}, from where the next start on this computer takes them"
        self._pending = []
        return message

    def close(self) -> None:
        try:
            self.flush()
        finally:
            self._file.close()


def _rescue_path(path: Path) -> Path:
    """Where the records that a metrics.jsonl lacks are kept: named after path and content, so that no other run takes them."""
    name = hashlib.sha256(f"{path.absolute()}\n".encode() + _whole_lines(path)).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"tiglon-{name}-{FILE_NAME}"


def rescue_records(path: Path, replace_file: ReplaceFile) -> None:
    """Append to a metrics.jsonl, or to one that was removed, the records that `JsonLines.rescue` kept of it."""
    rescued = _rescue_path(path)
    if rescued.is_file() and rescued.stat().st_uid == os.getuid():
        with suppress(OSError):
            replace_file(path, _whole_lines(path) + rescued.read_bytes())
            rescued.unlink()


def _whole_lines(path: Path) -> bytes:
    """The content of a metrics.jsonl without an incomplete last line; empty if there is no such file."""
    content = path.read_bytes() if path.is_file() else b""
    return content[: content.rfind(b"\n") + 1]
