"""The records of metrics.jsonl: read, made safe for JSON, truncated after a step."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

FILE_NAME = "metrics.jsonl"
ReplaceFile = Callable[[Path, bytes], None]
"""Replaces a local file atomically and durably. launch/ hands it in (data/storage/files.py)."""

NON_FINITE = ("NaN", "Infinity", "-Infinity")
"""JSON has no such numbers: they are written as these strings, which float() reads."""

TEXT_KEYS = frozenset(("kind", "name", "text", "what", "action", "sentence"))
"""Keys of a record whose values are text, even where they read as a number of NON_FINITE."""


def read_records(path: Path) -> list[dict[str, Any]]:
    """Every record of a metrics.jsonl, in order; an incomplete last line (of a killed run) is left out.

    Raises:
        ValueError: a line before the last is not a record.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    records = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is incomplete
        try:
            record = _record(line)
        except (ValueError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} line {number} is not a JSON record ({error}); remove or fix that line") from None
        records.append(record)
    return records


def json_safe(value: Any) -> Any:
    """The same value for json.dumps, with the strings of NON_FINITE for numbers that JSON does not have."""
    match value:
        case float() if not math.isfinite(value):
            return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        case dict():
            return {key: json_safe(entry) for key, entry in value.items()}
        case list() | tuple():
            return [json_safe(entry) for entry in value]
        case _:
            return value


def _record(line: str | bytes) -> dict[str, Any]:
    """A line of metrics.jsonl; raises ValueError, AttributeError or RecursionError for anything else."""
    return {key: value if key in TEXT_KEYS else _read_back(value) for key, value in json.loads(line).items()}


def _read_back(value: Any) -> Any:
    return float(value) if isinstance(value, str) and value in NON_FINITE else value


def truncate_records(path: Path, step: int, replace_file: ReplaceFile) -> tuple[list[dict[str, Any]], int]:
    """Drop the records after `step`, and an incomplete last line, atomically, so that a resumed run can append.

    The lines that stay do not change by a byte. Lines that are no records (a power cut leaves zeros) are moved to
    `path`.unreadable.

    Returns:
        The records of `step` itself, and the number of unreadable lines.
    """
    if not path.is_file():
        return [], 0
    whole = path.read_bytes()
    kept, last, unreadable = [], [], []
    for line in whole.split(b"\n")[:-1]:
        try:
            record = _record(line)
            at = record.get("step", 0)
            if not isinstance(at, int):
                raise ValueError("its step is no number")
        except (ValueError, AttributeError, RecursionError):
            unreadable.append(line + b"\n")
            continue
        if at <= step:
            kept.append(line + b"\n")
        if at == step:
            last.append(record)
    if unreadable:
        with open(path.with_name(path.name + ".unreadable"), "ab") as file:
            file.writelines(unreadable)
    if (content := b"".join(kept)) != whole:
        replace_file(path, content)
    return last, len(unreadable)


def plain_value(value: Any) -> Any:
    """A 0-dim tensor as its Python value, anything else as it is."""
    return value.item() if hasattr(value, "item") else value


def escape_html(text: str) -> str:
    """Text for the body of an HTML element."""
    return text.replace("&", "&amp;").replace("<", "&lt;")


def scalars(record: dict[str, Any]) -> dict[str, float]:
    """Curves of a record: `train/loss`, `evaluate/<name>/<context>/loss`; True counts as 1."""
    tag = [record["kind"], *(str(record[key]) for key in ("name", "context") if record.get(key) is not None)]
    numbers = {key: value for key, value in record.items() if isinstance(value, int | float) and key not in ("step", "context")}
    return {"/".join([*tag, key]): float(value) for key, value in numbers.items()}
