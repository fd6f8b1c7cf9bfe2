"""What a run writes down: metrics.jsonl always, TensorBoard and Weights & Biases by choice, behind one `record`."""

import importlib
import json
import math
import os
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

FILE_NAME = "metrics.jsonl"
NON_FINITE = ("NaN", "Infinity", "-Infinity")
"""JSON has no such numbers: they are written as these strings, which float() reads."""
TEXT_KEYS = frozenset(("kind", "name", "text", "what", "action", "sentence"))
"""Keys of a record whose values are text, whatever they say."""


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
            record = {key: value if key in TEXT_KEYS else _read_back(value) for key, value in json.loads(line).items()}
        except (json.JSONDecodeError, AttributeError) as error:
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


def _read_back(value: Any) -> Any:
    return float(value) if isinstance(value, str) and value in NON_FINITE else value


def keep_until(path: Path, step: int) -> None:
    """Drop the records after `step` (and a torn last line), atomically: what is written next continues the run it resumes.

    Floats are kept as they stand, so the kept lines do not change by a byte.
    """
    if not path.is_file():
        return
    whole = path.read_bytes()
    lines = [line for line in whole.split(b"\n")[:-1] if json.loads(line).get("step", 0) <= step]
    kept = b"".join(line + b"\n" for line in lines)
    if kept == whole:
        return
    beside = path.with_name(path.name + ".new")
    with open(beside, "wb") as file:
        file.write(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


class Metrics:
    """The run's pens. `record` takes {"kind", "step", ...} with plain numbers or 0-dim tensors.

    Args:
        directory: the run directory; None on ranks that write nothing.
        tensorboard: also write `directory/tensorboard`.
        wandb: Weights & Biases project; empty = off.
        config: the resolved configuration, shown by TensorBoard and Weights & Biases.
        from_step: step the run resumes from (optimizer updates); later records of an earlier life are dropped.
        say: told, in one sentence, when a pen cannot write.

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
        if directory is None:
            return
        directory.mkdir(parents=True, exist_ok=True)
        if wandb:  # first: it is the one that can refuse
            self._pens.append(_WeightsAndBiases(directory, wandb, config))
        self._pens.insert(0, _Lines(directory / FILE_NAME, from_step))
        if tensorboard:
            self._pens.append(_Board(directory / "tensorboard", config, from_step))

    def record(self, record: dict[str, Any]) -> None:
        """Write one record everywhere. A pen that fails (a full disk) is reported, never allowed to end the training."""
        plain = {key: _plain(value) for key, value in record.items()}
        self._each(lambda pen: pen.record(plain))

    def text(self, name: str, text: str, step: int) -> None:
        """Write a piece of text (a sample of the model) where text can be shown; metrics.jsonl keeps it too."""
        self._each(lambda pen: pen.text(name, text, step))

    def close(self) -> None:
        """Flush and close every pen."""
        self._each(lambda pen: pen.close())
        self._pens = []

    def _each(self, act: Callable[["_Pen"], None]) -> None:
        for pen in list(self._pens):
            try:
                act(pen)
            except OSError as error:
                reason = error.strerror or error
                self._say(f"metrics: {pen.name} cannot be written ({reason}); training goes on, {pen.afterwards}")
                if not pen.retries:
                    self._pens.remove(pen)


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


class _Pen(Protocol):
    name: str
    retries: bool
    afterwards: str

    def record(self, record: dict[str, Any]) -> None: ...
    def text(self, name: str, text: str, step: int) -> None: ...
    def close(self) -> None: ...


class _Lines:
    """metrics.jsonl. Python writes the shortest digits that read back to the same float, so nothing is rounded.

    Unbuffered: a killed run has every finished line on disk. What a full disk refuses waits in memory for the next record.
    """

    retries = True
    afterwards = "the records wait in memory until there is room"

    def __init__(self, path: Path, from_step: int) -> None:
        keep_until(path, from_step)
        self.name = str(path)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (open as long as the run)
        self._pending = b""

    def record(self, record: dict[str, Any]) -> None:
        self._pending += json.dumps(strict(record), ensure_ascii=False, allow_nan=False).encode() + b"\n"
        self._flush()

    def text(self, name: str, text: str, step: int) -> None:
        self.record({"kind": "text", "step": step, "name": name, "text": text})

    def close(self) -> None:
        self._flush()
        self._file.close()

    def _flush(self) -> None:
        while self._pending:
            written = self._file.write(self._pending)
            self._pending = self._pending[written:]


class _Board:
    """TensorBoard: one scalar a number, text for samples and health."""

    retries = False
    afterwards = "without TensorBoard"

    def __init__(self, directory: Path, config: dict[str, Any], from_step: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter  # seconds to import: only where it is wanted

        self.name = str(directory)
        self._writer = SummaryWriter(str(directory), purge_step=from_step + 1 if from_step else None, flush_secs=10)
        self._writer.add_text("config", f"```json\n{json.dumps(config, indent=2, default=str)}\n```", from_step)

    def record(self, record: dict[str, Any]) -> None:
        for tag, value in _scalars(record).items():
            self._writer.add_scalar(tag, value, record["step"])
        if record["kind"] == "health":
            self._writer.add_text("health", f"{record['what']} ({record['action']})", record["step"])

    def text(self, name: str, text: str, step: int) -> None:
        self._writer.add_text(name, f"```\n{text}\n```", step)

    def close(self) -> None:
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
        identity = directory / "wandb-run.txt"
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

    def close(self) -> None:
        self._run.finish()


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _scalars(record: dict[str, Any]) -> dict[str, float]:
    """Curves of a record: `train/loss`, `evaluate/<name>/<context>/loss`; True counts as 1."""
    where = [record["kind"], *(str(record[key]) for key in ("name", "context") if record.get(key) is not None)]
    numbers = {key: value for key, value in record.items() if isinstance(value, int | float) and key not in ("step", "context")}
    return {"/".join([*where, key]): float(value) for key, value in numbers.items()}
