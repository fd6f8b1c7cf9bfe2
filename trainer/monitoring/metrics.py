"""Writes a run's records: to metrics.jsonl always, to TensorBoard and a tracker by choice."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from trainer.monitoring.config import NO_TRACKER, TRACKERS, LogConfig
from trainer.monitoring.jsonl import JsonLines
from trainer.monitoring.records import FILE_NAME, ReplaceFile, plain_value, truncate_records
from trainer.monitoring.tensorboard import TensorBoard

_ATTEMPTS = 3
"""Of the last flush of a run."""
_PAUSE_SECONDS = 1.0
"""Between them."""


class MetricSink(Protocol):
    """One place that records are written to. Every method may raise what the library behind it raises."""

    name: str
    """File, directory or project, for messages."""
    retries: bool
    """It keeps what it could not write and tries again later; else it is dropped after its first error."""

    @property
    def afterwards(self) -> str:
        """For the message of an error: what happens to the records meanwhile."""
        ...

    def record(self, record: dict[str, Any]) -> None: ...
    def text(self, name: str, text: str, step: int) -> None: ...
    def truncate(self, step: int) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class Metrics:
    """The sinks of a run. `record` takes {"kind", "step", ...} with plain values or 0-dim tensors.

    Args:
        replace_file: as in trainer/monitoring/records.py.
        directory: the run directory; None on ranks that write nothing.
        log: whether to write `directory/tensorboard`, and to which tracker.
        config: the resolved configuration, shown by TensorBoard and the tracker.
        from_step: step the run resumes from (optimizer updates); later records are dropped, those of this step are in `last`.
        say: called with one sentence when a sink cannot write, or a line of metrics.jsonl cannot be read.

    Raises:
        ValueError: the tracker's package is not installed.
    """

    def __init__(
        self,
        replace_file: ReplaceFile,
        directory: Path | None,
        log: LogConfig,
        config: dict[str, Any],
        from_step: int = 0,
        say: Callable[[str], None] = lambda sentence: print(sentence, file=sys.stderr),
    ) -> None:
        self._say = say
        self._sinks: list[MetricSink] = []
        self._failing: set[str] = set()  # names of sinks that fail, until they write again
        self.last: list[dict[str, Any]] = []
        if directory is None:
            return
        directory.mkdir(parents=True, exist_ok=True)
        if log.tracker != NO_TRACKER:  # first: it is the one that may be refused
            self._sinks.append(TRACKERS[log.tracker](directory, log.project, config))
        path = directory / FILE_NAME
        self.last, unreadable = truncate_records(path, from_step, replace_file)
        if unreadable:
            lines = "1 line that is no record was" if unreadable == 1 else f"{unreadable} lines that are no records were"
            say(f"metrics: {lines} moved from {path} to {path.name}.unreadable")
        lines = JsonLines(path, say, replace_file)
        self._sinks.insert(0, lines)
        if log.tensorboard:
            self._sinks.append(TensorBoard(directory / "tensorboard", config, lines, from_step, self.last, replace_file))

    def record(self, record: dict[str, Any]) -> None:
        """Write one record to every sink. An error of a sink (a full disk) is reported and does not end the training."""
        plain = {key: plain_value(value) for key, value in record.items()}
        self._report(self._for_each(lambda sink: sink.record(plain)))

    def text(self, name: str, text: str, step: int) -> None:
        """Write a text, such as a sample of the model, to every sink."""
        self._report(self._for_each(lambda sink: sink.text(name, text, step)))

    def truncate(self, step: int) -> None:
        """The run goes back to `step`: drop all records after it from every sink that can."""
        self._report(self._for_each(lambda sink: sink.truncate(step)))

    def flush(self) -> None:
        """Call before a checkpoint: a run that resumes from it then finds every record up to its step."""
        faults = self._for_each(lambda sink: sink.flush())
        self._failing &= {sink.name for sink, _ in faults}
        self._report(faults)

    def flush_or_rescue(self) -> str:
        """Flush at the end of the run; where metrics.jsonl cannot be written, keep its records in the temporary directory.

        Returns:
            Which sinks lack records, why, and where those of metrics.jsonl are; "" if none does.
        """
        for attempt in range(_ATTEMPTS):
            if attempt:
                time.sleep(_PAUSE_SECONDS)
            if not (faults := self._for_each(lambda sink: sink.flush())):
                return ""
        self._failing |= {sink.name for sink, _ in faults}
        return _lacking_records(faults) + "".join(sink.rescue() for sink, _ in faults if isinstance(sink, JsonLines))

    def close(self) -> None:
        """Flush and close every sink."""
        faults = self._for_each(lambda sink: sink.close())
        if any(sink.name not in self._failing for sink, _ in faults):
            self._say(f"metrics: {_lacking_records(faults)}")
        self._sinks = []

    def _for_each(self, act: Callable[[MetricSink], None]) -> list[tuple[MetricSink, str]]:
        """Call `act` for every sink; those that failed, and why."""
        faults: list[tuple[MetricSink, str]] = []
        for sink in self._sinks:
            try:
                act(sink)
            except Exception as error:  # of any kind: other libraries are behind it
                faults.append((sink, str(getattr(error, "strerror", None) or error)))
        return faults

    def _report(self, faults: list[tuple[MetricSink, str]]) -> None:
        """One message per sink until it writes again."""
        for sink, reason in faults:
            if sink.name not in self._failing:
                self._failing.add(sink.name)
                self._say(f"metrics: {sink.name} cannot be written ({reason}); training is not affected, {sink.afterwards}")
            if not sink.retries:
                self._sinks.remove(sink)


def _lacking_records(faults: list[tuple[MetricSink, str]]) -> str:
    return ", ".join(f"{sink.name} lacks its last records ({reason})" for sink, reason in faults)
