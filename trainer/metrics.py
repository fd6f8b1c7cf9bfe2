"""What a run writes down: metrics.jsonl always, TensorBoard and Weights & Biases by choice, behind one `record`."""

import hashlib
import importlib
import json
import math
import os
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from trainer.store import replace_file

FILE_NAME = "metrics.jsonl"
WANDB_FILE = "wandb-run.txt"
NON_FINITE = ("NaN", "Infinity", "-Infinity")
"""JSON has no such numbers: they are written as these strings, which float() reads."""
TEXT_KEYS = frozenset(("kind", "name", "text", "what", "action", "sentence"))
"""Keys of a record whose values are text, whatever they say."""
_ATTEMPTS = 3
_PAUSE_SECONDS = 1.0


def read_records(path: Path) -> list[dict[str, Any]]:
    """Every record of a metrics.jsonl, in order; a last line torn by a kill is left out.

    Raises:
        ValueError: a line before the last is not a record.
    """
    if not path.is_file():
        return []
    lines = path.read_text().split("\n")
    records = []
    for number, line in enumerate(lines[:-1], start=1):  # a whole line ends with a newline: what follows the last one is torn
        try:
            record = _record(line)
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path} line {number} is not a JSON record ({error}); remove or mend that line") from None
        records.append(record)
    return records


def strict(value: Any) -> Any:
    """The same value for json.dumps, with the strings of NON_FINITE for numbers that JSON does not have."""
    match value:
        case float() if not math.isfinite(value):
            return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        case dict():
            return {key: strict(entry) for key, entry in value.items()}
        case list() | tuple():
            return [strict(entry) for entry in value]
        case _:
            return value


def _record(line: str | bytes) -> dict[str, Any]:
    """A line of metrics.jsonl; raises ValueError or AttributeError for anything else."""
    return {key: value if key in TEXT_KEYS else _read_back(value) for key, value in json.loads(line).items()}


def _read_back(value: Any) -> Any:
    return float(value) if isinstance(value, str) and value in NON_FINITE else value


def keep_until(path: Path, step: int) -> tuple[list[dict[str, Any]], int]:
    """Drop the records after `step` (and a torn last line), atomically: what is written next continues the run it resumes.

    Floats are kept as they stand, so the kept lines do not change by a byte. Lines that are no records (a power cut leaves
    zeros) are moved to `path`.unreadable.

    Returns:
        The records of `step` itself, and the number of unreadable lines.
    """
    if not path.is_file():
        return [], 0
    whole = path.read_bytes()
    kept, last, strange = [], [], []
    for line in whole.split(b"\n")[:-1]:
        try:
            record = _record(line)
            at = record.get("step", 0)
        except (ValueError, AttributeError):
            strange.append(line + b"\n")
            continue
        if at <= step:
            kept.append(line + b"\n")
        if at == step:
            last.append(record)
    if strange:
        with open(path.with_name(path.name + ".unreadable"), "ab") as file:
            file.writelines(strange)
    if (content := b"".join(kept)) != whole:
        replace_file(path, content)
    return last, len(strange)


class Metrics:
    """The run's pens. `record` takes {"kind", "step", ...} with plain numbers or 0-dim tensors.

    Args:
        directory: the run directory; None on ranks that write nothing.
        tensorboard: also write `directory/tensorboard`.
        wandb: Weights & Biases project; empty = off.
        config: the resolved configuration, shown by TensorBoard and Weights & Biases.
        from_step: step the run resumes from (optimizer updates); later records are dropped, those of this step are in `last`.
        say: told, in one sentence, when a pen cannot write, or a line of metrics.jsonl cannot be read.

    Raises:
        ValueError: `wandb` is set and the package is not installed.
    """

    def __init__(
        self,
        directory: Path | None,
        tensorboard: bool,
        wandb: str,
        config: dict[str, Any],
        from_step: int = 0,
        say: Callable[[str], None] = lambda sentence: print(sentence, file=sys.stderr),
    ) -> None:
        self._say = say
        self._pens: list[_Pen] = []
        self._told: set[str] = set()  # pens that fail, until they write again
        self.last: list[dict[str, Any]] = []
        if directory is None:
            return
        directory.mkdir(parents=True, exist_ok=True)
        if wandb:  # first: it is the one that can refuse
            self._pens.append(_WeightsAndBiases(directory, wandb, config))
        path = directory / FILE_NAME
        self.last, strange = keep_until(path, from_step)
        if strange:
            lines = "1 line that is no record was" if strange == 1 else f"{strange} lines that are no records were"
            say(f"metrics: {lines} moved from {path} to {path.name}.unreadable")
        lines = _Lines(path, say)
        self._pens.insert(0, lines)
        if tensorboard:
            self._pens.append(_Board(directory / "tensorboard", config, lines, from_step, self.last))

    def record(self, record: dict[str, Any]) -> None:
        """Write one record everywhere. A pen that fails (a full disk) is reported, never allowed to end the training."""
        plain = {key: _plain(value) for key, value in record.items()}
        self._tell(self._each(lambda pen: pen.record(plain)))

    def text(self, name: str, text: str, step: int) -> None:
        """Write a piece of text (a sample of the model) where text can be shown; metrics.jsonl keeps it too."""
        self._tell(self._each(lambda pen: pen.text(name, text, step)))

    def back_to(self, step: int) -> None:
        """The run goes back to `step`: what came after it is dropped everywhere."""
        self._tell(self._each(lambda pen: pen.back_to(step)))

    def flush(self) -> None:
        """Before a checkpoint: a run that resumes from it must find every record up to its step, however this one ends."""
        faults = self._each(lambda pen: pen.flush())
        self._told &= {pen.name for pen, _ in faults}
        self._tell(faults)

    def secure(self) -> str:
        """Try to have every record where it belongs: the run ends, and there is no later save.

        Returns:
            What lacks records, why, and where those of metrics.jsonl are; "" if nothing does.
        """
        for attempt in range(_ATTEMPTS):
            if attempt:
                time.sleep(_PAUSE_SECONDS)
            if not (faults := self._each(lambda pen: pen.flush())):
                return ""
        self._told |= {pen.name for pen, _ in faults}
        return _lacking(faults) + "".join(pen.rescue() for pen, _ in faults if isinstance(pen, _Lines))

    def close(self) -> None:
        """Flush and close every pen."""
        faults = self._each(lambda pen: pen.close())
        if any(pen.name not in self._told for pen, _ in faults):
            self._say(f"metrics: {_lacking(faults)}")
        self._pens = []

    def _each(self, act: Callable[["_Pen"], None]) -> list[tuple["_Pen", str]]:
        """Do it with every pen; those that failed, and why."""
        faults: list[tuple[_Pen, str]] = []
        for pen in self._pens:
            try:
                act(pen)
            except Exception as error:  # whatever a library of somebody else's raises
                faults.append((pen, str(getattr(error, "strerror", None) or error)))
        return faults

    def _tell(self, faults: list[tuple["_Pen", str]]) -> None:
        """Once for as long as it lasts."""
        for pen, reason in faults:
            if pen.name not in self._told:
                self._told.add(pen.name)
                self._say(f"metrics: {pen.name} cannot be written ({reason}); training is not affected, {pen.afterwards}")
            if not pen.retries:
                self._pens.remove(pen)


def _lacking(faults: list[tuple["_Pen", str]]) -> str:
    return ", ".join(f"{pen.name} lacks its last records ({reason})" for pen, reason in faults)


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


class _Pen(Protocol):
    name: str
    retries: bool
    afterwards: str

    def record(self, record: dict[str, Any]) -> None: ...
    def text(self, name: str, text: str, step: int) -> None: ...
    def back_to(self, step: int) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class _Lines:
    """metrics.jsonl. Python writes the shortest digits that read back to the same float, so nothing is rounded.

    Unbuffered: a killed run has every finished line on disk. What a full disk refuses waits in memory for the next record,
    a rewind too.
    """

    retries = True
    afterwards = "the records wait in memory until it can be"

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self.name, self._say = str(path), say
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (open as long as the run)
        self._pending: list[tuple[int, bytes]] = []  # step and line
        self._drop_after: int | None = None

    def record(self, record: dict[str, Any]) -> None:
        line = json.dumps(strict(record), ensure_ascii=False, allow_nan=False).encode() + b"\n"
        self._pending.append((record.get("step", 0), line))
        self.flush()

    def text(self, name: str, text: str, step: int) -> None:
        self.record({"kind": "text", "step": step, "name": name, "text": text})

    def back_to(self, step: int) -> None:
        self._pending = [(at, line) for at, line in self._pending if at <= step]
        self._drop_after = step if self._drop_after is None else min(step, self._drop_after)
        self.flush()

    def flush(self) -> None:
        if self._drop_after is not None:
            keep_until(Path(self.name), self._drop_after)
            self._file.close()
            self._file = open(self.name, "ab", buffering=0)  # noqa: SIM115
            self._drop_after = None
        elif not self._is_there():
            gone, self._file = self._file, open(self.name, "ab", buffering=0)  # noqa: SIM115
            gone.close()
            self._say(f"metrics: {self.name} was removed while the run was going on; it begins again here")
        while self._pending:
            self._write(self._pending[0][1])
            self._pending.pop(0)

    def _is_there(self) -> bool:
        """Whether what is written can still be found under its name."""
        with suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self._file.fileno()), os.stat(self.name))
        return False

    def _write(self, line: bytes) -> None:
        """Write a whole line, or nothing of it."""
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
        """Keep the records that wait where there may be room; what to say of it."""
        if not self._pending or self._drop_after is not None:
            return ""
        path = _rescued(Path(self.name))
        try:
            path.write_bytes(b"".join(line for _, line in self._pending))
        except OSError as error:
            return f"; they are lost ({error.strerror})"
        found = f"; {len(self._pending)} are in {path}, from where the next start on this computer takes them"
        self._pending = []
        return found

    def close(self) -> None:
        try:
            self.flush()
        finally:
            self._file.close()


def _rescued(path: Path) -> Path:
    """Where the records are kept that a metrics.jsonl lacks: named after what it holds, so that no other one takes them."""
    name = hashlib.sha256(f"{path.absolute()}\n".encode() + _whole_lines(path)).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"tiglon-{name}-{FILE_NAME}"


def bring_back(path: Path) -> None:
    """Give a metrics.jsonl, or one that is gone, the records that it lacks, if there is room for them now."""
    rescued = _rescued(path)
    if rescued.is_file() and rescued.stat().st_uid == os.getuid():
        with suppress(OSError):
            replace_file(path, _whole_lines(path) + rescued.read_bytes())
            rescued.unlink()


def _whole_lines(path: Path) -> bytes:
    """What a metrics.jsonl holds, but for a last line that is torn; nothing if it is not there."""
    content = path.read_bytes() if path.is_file() else b""
    return content[: content.rfind(b"\n") + 1]


class _Board:
    """TensorBoard: one scalar a number, text for samples and health.

    It writes beside the training and may lose what it was given last. What was lost (to a full disk, or a kill) is written
    again from metrics.jsonl, which loses nothing, as soon as that works: in this run, or in the one that resumes it.
    """

    retries = True
    afterwards = "TensorBoard is made up for when it can be"

    def __init__(
        self, directory: Path, config: dict[str, Any], lines: _Lines, from_step: int, last: list[dict[str, Any]]
    ) -> None:
        self.name = str(directory)
        self._lines = lines
        self._whole_file = directory / "whole-until.txt"
        """The last step of a flush that worked; without it the records are written again from the beginning."""
        since = min(from_step, self._known_whole())
        self._forget(from_step)
        self._open(since, last if since == from_step else self._records(since))
        self._writer.add_text("config", f"```json\n{json.dumps(config, indent=2, default=str)}\n```", from_step)

    def _known_whole(self) -> int:
        with suppress(FileNotFoundError, ValueError):
            return int(self._whole_file.read_text())
        return 0

    def _forget(self, step: int) -> None:
        """What came after `step` no longer counts, whatever room there is to write that down."""
        self._latest = step
        if self._known_whole() > step:
            self._whole_file.unlink()

    def _records(self, since: int) -> list[dict[str, Any]]:
        """Those of metrics.jsonl from the step `since` on."""
        return [record for record in read_records(Path(self._lines.name)) if record.get("step", 0) >= since]

    def _open(self, since: int, records: list[dict[str, Any]]) -> None:
        """Forget everything from the step `since` on and write its records again: what came after a flush may be lost."""
        from torch.utils.tensorboard.writer import SummaryWriter  # seconds to import: only where it is wanted

        self._broken = False
        self._whole_until = since
        self._writer = SummaryWriter(self.name, purge_step=since, flush_secs=10)
        for record in records:
            if record["kind"] == "text":
                self.text(record["name"], record["text"], record["step"])
            else:
                self.record(record)

    def record(self, record: dict[str, Any]) -> None:
        self._latest = max(self._latest, record["step"])
        for tag, value in _scalars(record).items():
            self._add(self._writer.add_scalar, tag, value, record["step"])
        if record["kind"] == "health":
            self._add(self._writer.add_text, "health", f"{record['what']} ({record['action']})", record["step"])

    def text(self, name: str, text: str, step: int) -> None:
        self._add(self._writer.add_text, name, f"```\n{text}\n```", step)

    def _add(self, add: Callable[..., None], *what: Any) -> None:
        if self._broken:
            return  # it is in metrics.jsonl
        try:
            add(*what)
        except Exception:
            self._broken = True
            raise

    def back_to(self, step: int) -> None:
        self._close()
        self._forget(step)
        self._whole_until, self._broken = step, True
        self.flush()

    def flush(self) -> None:
        try:
            if self._broken:  # begin again where the last flush was whole
                self._lines.flush()
                self._close()
                self._open(self._whole_until, self._records(self._whole_until))
            self._writer.flush()
            if self._latest != self._known_whole():
                replace_file(self._whole_file, f"{self._latest}\n".encode())
        except Exception:
            self._broken = True
            raise
        self._whole_until = self._latest

    def close(self) -> None:
        self.flush()
        self._close()

    def _close(self) -> None:
        with suppress(Exception):  # of a writer that has failed
            self._writer.close()


def find_wandb(project: str) -> Any:
    """The wandb package, which `project` (log.wandb) is to be written with.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.import_module("wandb")
    except ImportError:
        raise ValueError(
            f"log.wandb = '{project}' needs the wandb package, which is not installed; "
            "run pip install 'tiglon[wandb]' or set log.wandb = ''"
        ) from None


class _WeightsAndBiases:
    """The optional extra; its run carries on under the same id when ours resumes."""

    retries = False
    afterwards = "without Weights & Biases"

    def __init__(self, directory: Path, project: str, config: dict[str, Any]) -> None:
        package = find_wandb(project)
        self.name = f"wandb project {project}"
        identity = directory / WANDB_FILE
        if not identity.is_file():
            identity.write_text(uuid.uuid4().hex[:8] + "\n")
        self._wandb = package
        self._run = package.init(
            project=project, dir=str(directory), config=config, id=identity.read_text().strip(), resume="allow"
        )
        self._run.define_metric("*", step_metric="step")

    def record(self, record: dict[str, Any]) -> None:
        self._run.log({**_scalars(record), "step": record["step"]})

    def text(self, name: str, text: str, step: int) -> None:
        self._run.log({name: self._wandb.Html(f"<pre>{_escaped(text)}</pre>"), "step": step})

    def back_to(self, step: int) -> None:
        """Nothing that was sent can be taken back."""

    def flush(self) -> None:
        """It sends by itself."""

    def close(self) -> None:
        self._run.finish()


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _scalars(record: dict[str, Any]) -> dict[str, float]:
    """Curves of a record: `train/loss`, `evaluate/<name>/<context>/loss`; True counts as 1."""
    where = [record["kind"], *(str(record[key]) for key in ("name", "context") if record.get(key) is not None)]
    numbers = {key: value for key, value in record.items() if isinstance(value, int | float) and key not in ("step", "context")}
    return {"/".join([*where, key]): float(value) for key, value in numbers.items()}
