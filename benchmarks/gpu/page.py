"""gpu.md from the lines of gpu.jsonl: of each part the newest run that finished."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.gpu.figures import read
from data.storage import replace_file

Record = dict[str, Any]


def write(folder: Path) -> str:
    """Make the page; its text."""
    text = "\n".join(lines(read(folder)))
    replace_file(folder / "gpu.md", f"{text}\n".encode())
    return text


def failed(folder: Path, run: str) -> bool:
    """Whether anything of a run went wrong."""
    return any("error" in record for record in read(folder) if record["run"] == run)


def newest(records: list[Record], part: str) -> list[Record]:
    """The figures of a part, all of one run: the last that ended well, else the last that has figures, else the last."""
    own = [record for record in records if record["part"] == part]
    well = [record for record in own if record["what"] == "end" and "error" not in record]
    runs = well or [record for record in own if _figure(record)] or own
    return [record for record in own if record["run"] == runs[-1]["run"]] if runs else []


def later(records: list[Record], part: str) -> Iterable[str]:
    """A line for every run of a part after the one that is shown, none of which ended well, and what went wrong in it."""
    own = [record for record in records if record["part"] == part]
    shown = newest(records, part)
    for run in dict.fromkeys(record["run"] for record in own[own.index(shown[-1]) + 1 :]):
        told = [record for record in own if record["run"] == run]
        ends = [record for record in told if record["what"] == "end"]
        if ends and "seconds" not in ends[-1]:
            continue  # it was not started
        why = ends[-1]["error"] if ends else "killed with the command"
        yield f"- The call of {run} broke off ({why}); its figures in gpu.jsonl: {sum(map(_figure, told))}"
        yield from (f"  - {_named(one)}: {one['error']}" for one in told if "error" in one and one["what"] != "end")


def _figure(record: Record) -> bool:
    return record["what"] not in NO_FIGURES and "error" not in record


NO_FIGURES = ("end", "failed", "failed test")
"""Optional fields of a record."""


def lines(records: list[Record]) -> list[str]:
    """The whole page: of calls on the same kind of device and with the same sizes as the last one."""
    begun = [record for record in records if record["what"] == "begin"]
    sorts = {record["run"]: (record["device"], record.get("card"), record["tiny"]) for record in begun}
    last = list(sorts.values())[-1] if sorts else None
    records = [record for record in records if sorts.get(record["run"]) == last]
    parts = list(dict.fromkeys(record["part"] for record in records if record["part"] != "run"))
    used = {record["run"] for part in parts for record in newest(records, part)}
    machine = next((record for record in reversed(records) if record["what"] == "machine" and "name" in record), {})
    commands = [f"    {record['command']}    # {record['run']}" for record in begun if record["run"] in used]
    title = "On one GPU" if not last or last[0] == "cuda" else "Every part on a CPU"
    found = [f"# {title}{', with small sizes: whether it runs, not how fast' if last and last[2] else ''}", "", *commands, ""]
    found += [
        _where(machine, last),
        "",
        "A step's MFU is of causal attention and the data sheet's peak. `update` counts the bytes that a rule has to move. "
        "Times of a single call (`ceilings`, `update`) go from the host's first launch to the end of the last kernel. "
        "A product's shape is rows x inner x columns; attention's is sequences x tokens x query heads x key heads x width x "
        "width of values.",
        "",
    ]
    for part in parts:
        own = newest(records, part)
        found += [f"## {part}", "", *_lines(own, records), ""]
        if broken := list(later(records, part)):
            found += [*broken, ""]
    return found[:-1]


def _where(machine: Record, last: tuple[str, str, bool] | None) -> str:
    if not machine:
        card = last[1] or last[0] if last else "Nobody knows where"
        return f"{card}; the part `machine` did not run there. Ratios are within one call."
    memory = f", {machine['bytes'] / 1e9:.0f} GB" if "bytes" in machine else ""
    cudnn = f", cuDNN {machine['cudnn']}" if machine.get("cudnn") else ""
    return (
        f"{machine['name']}{memory}, torch {machine['torch']}{cudnn}, Python {machine['python']}. Ratios are within one call."
    )


def _lines(own: list[Record], records: list[Record]) -> list[str]:
    """A part: a table for every kind of figure that it has, then what went wrong."""
    found: list[str] = []
    kinds = list(dict.fromkeys(record["what"] for record in own if record["what"] not in NO_FIGURES))
    for kind in kinds:
        rows = [record for record in own if record["what"] == kind and "error" not in record]
        if rows:
            found += [*_table(kind, [_shown(kind, row, records) for row in rows]), ""]
    found += [f"- {_named(record)}: {record['error']}" for record in own if "error" in record]
    ended = [f", {record['seconds']:.0f} s" for record in own if record["what"] == "end" and "seconds" in record]
    return [*found, *([""] if found and found[-1] else []), f"Call of {own[-1]['run']}{''.join(ended)}."]


def _named(record: Record) -> str:
    names = [str(record[key]) for key in ("name", "rule", "shape", "engine", "heads", "length", "backend") if key in record]
    return " ".join([record["what"], *names])


HIDDEN = {"run", "part", "what", "at", "kernels", "rounds", "said"}
"""Keys of a record that its row does not show."""


def _shown(kind: str, row: Record, records: list[Record]) -> dict[str, str]:
    """A record as the cells of its row."""
    cells = {key: _cell(key, value) for key, value in row.items() if key not in HIDDEN}
    if kind == "step" and row.get("planned_bytes"):
        cells["memory / planned"] = f"{row['bytes'] / row['planned_bytes']:.2f}"
    if kind == "peer" and row.get("tokens_per_second"):
        ours = [
            one["tokens_per_second"]
            for one in records
            if one["what"] == "step" and "tokens_per_second" in one and one["run"] == row["run"]
            and (one["shape"], one["length"], one["micro_batches"]) == (row["shape"], row["length"], 1)
        ]  # fmt: skip
        cells["tiglon over it"] = f"{max(ours) / row['tokens_per_second']:.2f}" if ours else "not in this call"
    if kind == "update":
        copies = [
            one["tb_per_second"] for one in records if one["what"] == "copy" and one["run"] == row["run"] and "error" not in one
        ]
        cells["of a copy"] = f"{row['tb_per_second'] / copies[-1]:.0%}" if copies else "not in this call"
    return cells


def _cell(key: str, value: Any) -> str:
    match value:
        case bool():
            return "yes" if value else "no"
        case str():
            return value
        case int() | float() if key.endswith("bytes"):
            return f"{value / 1e9:.2f} GB"
        case float() if key == "mfu":
            return f"{value:.1%}"
        case int() | float():
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
        case dict() if any(isinstance(one, dict) for one in value.values()):
            return "; ".join(f"{name}: {_cell(key, one)}" for name, one in value.items())
        case dict():
            return ", ".join(f"{name} {_cell(key, one)}" for name, one in value.items())
        case list() if key == "shape":
            return " x ".join(str(one) for one in value)
        case list():
            return ", ".join(_cell(key, one) for one in value)
        case _:
            return str(value)


def _table(kind: str, rows: list[dict[str, str]]) -> Iterable[str]:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    yield f"{kind}:"
    yield ""
    yield "| " + " | ".join(column.replace("_", " ") for column in columns) + " |"
    yield "|---" * len(columns) + "|"
    for row in rows:
        yield "| " + " | ".join(row.get(column, "") for column in columns) + " |"
