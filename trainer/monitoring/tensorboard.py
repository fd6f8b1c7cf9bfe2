"""A run's records as TensorBoard events."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainer.monitoring.jsonl import JsonLines
from trainer.monitoring.records import ReplaceFile, read_records, scalars


class TensorBoard:
    """A scalar for every number of a record, text for samples and health.

    TensorBoard's writer works in a thread of its own and may lose what it was given last. What a full disk or a kill has lost
    is written again from metrics.jsonl, which loses nothing, as soon as that is possible: in this run, or in the one that
    resumes it.
    """

    retries = True
    afterwards = "its records are written again when it can be"

    def __init__(
        self,
        directory: Path,
        config: dict[str, Any],
        lines: JsonLines,
        from_step: int,
        last: list[dict[str, Any]],
        replace_file: ReplaceFile,
    ) -> None:
        self.name = str(directory)
        self._replace_file = replace_file
        self._lines = lines
        self._flushed_file = directory / "whole-until.txt"
        """Holds the step of the last flush that worked; without it all records are written again."""
        since = min(from_step, self._flushed_step())
        self._drop_after(from_step)
        self._open(since, last if since == from_step else self._records(since))
        self._writer.add_text("config", f"```json\n{json.dumps(config, indent=2, default=str)}\n```", from_step)

    def _flushed_step(self) -> int:
        with suppress(FileNotFoundError, ValueError):
            return int(self._flushed_file.read_text())
        return 0

    def _drop_after(self, step: int) -> None:
        """Records after `step` no longer count; this needs no space on the disk."""
        self._latest = step
        if self._flushed_step() > step:
            self._flushed_file.unlink()

    def _records(self, since: int) -> list[dict[str, Any]]:
        """Records of metrics.jsonl from the step `since` on."""
        return [record for record in read_records(Path(self._lines.name)) if record.get("step", 0) >= since]

    def _open(self, since: int, records: list[dict[str, Any]]) -> None:
        """Purge everything from the step `since` on and write its records again: what came after a flush may be lost."""
        from torch.utils.tensorboard.writer import SummaryWriter  # takes seconds to import

        self._broken = False
        self._rewrite_from = since
        self._writer = SummaryWriter(self.name, purge_step=since, flush_secs=10)
        for record in records:
            if record["kind"] == "text":
                self.text(record["name"], record["text"], record["step"])
            else:
                self.record(record)

    def record(self, record: dict[str, Any]) -> None:
        self._latest = max(self._latest, record["step"])
        for tag, value in scalars(record).items():
            self._add(self._writer.add_scalar, tag, value, record["step"])
        if record["kind"] == "health":
            self._add(self._writer.add_text, "health", f"{record['what']} ({record['action']})", record["step"])

    def text(self, name: str, text: str, step: int) -> None:
        self._add(self._writer.add_text, name, f"```\n{text}\n```", step)

    def _add(self, add: Callable[..., None], *event: Any) -> None:
        if self._broken:
            return  # flush writes it again from metrics.jsonl
        try:
            add(*event)
        except Exception:
            self._broken = True
            raise

    def truncate(self, step: int) -> None:
        self._close()
        self._drop_after(step)
        self._rewrite_from, self._broken = step, True
        self.flush()

    def flush(self) -> None:
        try:
            if self._broken:  # write again what came after the last flush that worked
                self._lines.flush()
                self._close()
                self._open(self._rewrite_from, self._records(self._rewrite_from))
            self._writer.flush()
            if self._latest != self._flushed_step():
                self._replace_file(self._flushed_file, f"{self._latest}\n".encode())
        except Exception:
            self._broken = True
            raise
        self._rewrite_from = self._latest

    def close(self) -> None:
        self.flush()
        self._close()

    def _close(self) -> None:
        with suppress(Exception):  # of a writer that has failed
            self._writer.close()
