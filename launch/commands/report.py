"""`tiglon report RUN [RUN...]`: plots of each run, and one self-contained page that compares them."""

import html
import io
import itertools
import math
import statistics
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from data.storage import write_atomic
from launch.config import RESOLVED
from launch.plots.experts import ExpertLoads
from launch.plots.figures import COLOURS, Bars, Curve, Plot, svg
from launch.run_status import run_status
from launch.versions import translate_checkpoint
from trainer.monitoring.progress import format_bytes, format_count, format_duration, format_perplexity
from trainer.monitoring.records import FILE_NAME, read_records
from trainer.printable import printable

PAGE_NAME = "report.html"
_TEXTS = {"evaluate": ("name",), "experts": ("name",), "health": ("sentence",), "text": ("text",)}
_NUMBERS = {
    "train": ("step", "tokens", "loss"),
    "evaluate": ("step", "loss"),
    "experts": ("step", "largest", "smallest"),
    "text": ("step",),
}
"""Kind of a record -> keys that it must have to be shown."""
_CURVES = (
    "learning_rate", "grad_norm", "tokens_per_second", "mfu", "mfu_full", "memory_bytes", "step_seconds", "logit_bound",
    "expert_load_max",
)  # fmt: skip
"""Numbers that a train record may have."""


@dataclass(frozen=True)
class History:
    """The records of one run."""

    directory: Path
    label: str
    colour: str
    train: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    health: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    loads: ExpertLoads | None
    """In a network with experts."""
    config: dict[str, Any]
    steps: int | None
    """train.steps; None where the run does not say."""
    status: str
    """How it stands, a sentence (launch/run_status.py)."""

    def values(self, key: str) -> list[float]:
        """One field of the train records that have it."""
        return [record[key] for record in self.train if key in record]


def report_command(runs: Annotated[list[str], typer.Argument(help="Run directories; the page goes into the first.")]) -> None:
    """Plot runs and compare them on one page.

    Example: tiglon report runs/quickstart runs/another
    """
    for history in (histories := read_histories(runs)):
        print(printable(f"{history.label}: {history.status}"))
    page = write_report(histories)
    print(f"plots in {page.parent}, all of them on one page: {page}")


def read_histories(runs: list[str]) -> list[History]:
    """Each run's records once, labelled by its name, or its path where runs share a name; raises as `read_history`."""
    directories = {Path(run).resolve(): Path(run) for run in runs}
    names = [resolved.name for resolved in directories]
    labels = [name if names.count(name) == 1 else str(run) for name, run in zip(names, directories.values(), strict=True)]
    return [read_history(*named) for named in zip(directories.values(), labels, itertools.cycle(COLOURS))]


def write_report(histories: list[History]) -> Path:
    """Write RUN/report/*.png for each run, and FIRST_RUN/report/report.html, which compares them.

    Returns:
        The path of the page.

    Raises:
        OSError: a plot or the page cannot be written; none is left half-written.
    """
    for history in histories:
        for plot in (*plots([history]), *([history.loads] if history.loads else [])):
            png = io.BytesIO()
            plot.figure().savefig(png, dpi=150)
            write_atomic(str(history.directory / "report" / f"{plot.name}.png"), png.getvalue())
    path = histories[0].directory / "report" / PAGE_NAME
    write_atomic(str(path), report_page(histories).encode())
    return path


def read_history(directory: Path, label: str, colour: str) -> History:
    """Read metrics.jsonl and config.toml of a run directory.

    Raises:
        FileNotFoundError: there are no metrics.
        ValueError: they hold no training step.
    """
    path = directory / FILE_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give the directory of a run that has trained (run.dir)")
    records = read_records(path)
    if not any(record.get("kind") == "train" for record in records):
        raise ValueError(f"{path} holds no training step yet; wait for the first record (log.every_steps) or train longer")
    if fault := next(filter(None, map(_record_fault, records)), ""):
        raise ValueError(f"{path} has a record {fault}; remove it from the file to report without it")
    train = without_rewound(records, "train")
    config = _read_config(directory / "config.toml")
    steps = _flat(config).get("train.steps")
    steps = steps if isinstance(steps, int) else None
    return History(
        directory=directory,
        label=label,
        colour=colour,
        train=train,
        evaluations=without_rewound(records, "evaluate"),
        health=[record for record in records if record["kind"] == "health"],
        samples=without_rewound(records, "text"),
        loads=ExpertLoads.of_records(without_rewound(records, "experts")),
        config=config,
        steps=steps,
        status=run_status(directory, train[-1]["step"], steps),
    )


def _record_fault(record: dict[str, Any]) -> str:
    """What keeps a record from being shown, or ""."""
    kind = record.get("kind")
    if not isinstance(kind, str):
        return "without a kind"
    named = f"of the kind {ascii(kind)[:40]}"
    for key in _TEXTS.get(kind, ()):
        if not isinstance(record.get(key), str):
            return f"{named} whose {key} is no text"
    optional = [key for key in record if kind == "train" and (key in _CURVES or key.endswith("_share"))]
    for key in (*_NUMBERS.get(kind, ()), *optional):
        value = record.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or (isinstance(value, int) and abs(value) >= 1 << 63):
            return f"{named} whose {key} is no number"
    if kind == "experts" and not _is_load(record.get("load")):
        return f"{named} whose load is no list of numbers"
    return f"{named} of step 0" if kind == "train" and record["step"] <= 0 else ""


def _is_load(value: Any) -> bool:
    """Shares of experts, at least one."""
    return isinstance(value, list) and bool(value) and all(isinstance(x, float | int) and math.isfinite(x) for x in value)


def _read_config(path: Path) -> dict[str, Any]:
    """The values that acted; none where there is no file."""
    if not path.is_file():
        return {}
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
        return translate_checkpoint(values.get(RESOLVED, values))
    except ValueError as error:
        raise ValueError(f"{path} is not TOML ({error}); fix it, or remove it to report without it") from None


def without_rewound(records: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Records of a kind in the order of their steps, without the steps that a rewind undid."""
    kept: list[dict[str, Any]] = []
    afterwards: list[dict[str, Any]] = []  # by `tiglon evaluate`, of any checkpoint: a lower step is no rewind
    for record in (record for record in records if record["kind"] == kind):
        if "checkpoint" in record:
            afterwards.append(record)
            continue
        while kept and kept[-1]["step"] > record["step"]:
            kept.pop()
        kept.append(record)
    return sorted(kept + afterwards, key=lambda record: record["step"]) if afterwards else kept


def plots(histories: list[History]) -> list[Plot | Bars]:
    """Figures that show the runs together: loss, learning rate, gradient norm, throughput, largest load of an expert,
    bound of attention logits (optimizer.qk_clip) and where the time goes; those for which no run has a value are left out."""
    figures: list[Plot | Bars] = [
        Plot("loss", "Loss", "tokens", "nats per token", _curves(histories, "tokens", "loss"), _validations(histories), True),
        Plot("learning_rate", "Learning rate", "step", "", _curves(histories, "step", "learning_rate"), []),
        Plot("grad_norm", "Gradient norm", "step", "", _curves(histories, "step", "grad_norm"), [], True),
        Plot(
            "throughput", "Throughput", "step", "tokens per second", _curves(histories, "step", "tokens_per_second"), [], True
        ),
        Plot(
            "expert_load_max", "Largest load of an expert", "step", "over that of even loads",
            _curves(histories, "step", "expert_load_max"), [],
        ),
        Plot("logit_bound", "Bound of attention logits", "step", "", _curves(histories, "step", "logit_bound"), [], True),
        Bars("time", "Where the time goes", [(history.label, _shares(history)) for history in histories]),
    ]  # fmt: skip
    return [figure for figure in figures if not figure.empty]


def _curves(histories: list[History], x: str, y: str) -> list[Curve]:
    curves = []
    for history in histories:
        records = [record for record in history.train if x in record and y in record]
        curves.append(
            Curve(history.label, history.colour, [record[x] for record in records], [record[y] for record in records])
        )
    return curves


def _validations(histories: list[History]) -> list[Curve]:
    """One line per run, validation part and context; x is tokens, from the step of the evaluation."""
    curves = []
    for history in histories:
        last = history.train[-1]
        for (name, context), records in _by_part(history).items():
            label = name + (f" at {context:,} tokens" if context is not None else "")
            x = [record["step"] * last["tokens"] / last["step"] for record in records]
            curves.append(Curve(label, history.colour, x, [record["loss"] for record in records]))
    return curves


def _by_part(history: History) -> dict[tuple[str, int | None], list[dict[str, Any]]]:
    parts: dict[tuple[str, int | None], list[dict[str, Any]]] = {}
    for record in history.evaluations:
        parts.setdefault((record["name"], record.get("context")), []).append(record)
    return parts


def _shares(history: History) -> dict[str, float]:
    """Mean share of each kind of work over the run."""
    keys = dict.fromkeys(key for record in history.train for key in record if key.endswith("_share"))
    return {key.removesuffix("_share"): statistics.fmean(record.get(key, 0.0) for record in history.train) for key in keys}


def run_summary(history: History) -> dict[str, str]:
    """The rows of the table for one run: name -> value."""
    last = history.train[-1]
    row = {
        "steps": f"{last['step']:,}" + ("" if history.steps is None else f" of {history.steps:,}"),
        "tokens": format_count(last["tokens"]),
        "first loss": f"{history.train[0]['loss']:.4f}",
        "last loss": f"{last['loss']:.4f}",
    }
    for (name, context), records in _by_part(history).items():
        finite = [record for record in records if math.isfinite(record["loss"])]
        best = min(finite, key=lambda record: record["loss"], default=records[-1])
        where = f"{name}, {context:,} tokens" if context is not None else name
        row[where] = f"{records[-1]['loss']:.4f} (perplexity {format_perplexity(records[-1]['loss'])})"
        if best is not records[-1]:
            row[where] += f", best {best['loss']:.4f} at step {best['step']:,}"
    row["tokens per second"] = format_count(statistics.median(history.values("tokens_per_second") or [0.0]))
    for key, name in (("mfu", "MFU, causal"), ("mfu_full", "MFU, full attention")):
        if history.values(key):
            row[name] = f"{100 * statistics.median(history.values(key)):.1f} %"
    if history.values("memory_bytes"):
        row["peak memory of rank 0"] = format_bytes(max(history.values("memory_bytes")))
    if history.values("step_seconds"):
        row["median step"] = _step_time(statistics.median(history.values("step_seconds")))
    row["health records"] = str(len(history.health))
    return row


def _step_time(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 10 else format_duration(seconds)


def config_differences(histories: list[History]) -> dict[str, list[str]]:
    """Configuration keys in which the runs differ, with each run's value ("" where it has none)."""
    flat = [_flat(history.config) for history in histories]
    for config in flat:  # where a run lies is no difference, nor are its checkpoints in their usual place
        if config.pop("run.dir", "") == str(config.get("checkpoint.directory", "")).removesuffix("/checkpoints"):
            config.pop("checkpoint.directory", None)
    keys = dict.fromkeys(key for config in flat for key in config)
    rows = {key: [str(config.get(key, "")) for config in flat] for key in keys}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}


def _flat(config: dict[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat.update(_flat(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}": value})
    return flat


def report_page(histories: list[History]) -> str:
    """The page as HTML that loads nothing: styles and figures are inside."""
    labels = [history.label for history in histories]
    title = " and ".join(labels) if len(labels) < 3 else f"{len(labels)} runs"
    rows = [run_summary(history) for history in histories]
    names = dict.fromkeys(name for row in rows for name in row)
    states = "".join(f"<li>{_named(history)}: {html.escape(history.status)}</li>\n" for history in histories)
    parts = [f'<ul class="runs">{states}</ul>']
    parts += [_table("Runs", histories, {name: [row.get(name, "") for row in rows] for name in names})]
    parts += [f"<figure>{svg(plot)}</figure>" for plot in plots(histories)]
    if len(histories) > 1:
        differing = config_differences(histories)
        parts.append(_table("Configuration that differs", histories, differing) if differing else "<p>Same configuration.</p>")
    for number, history in enumerate(histories):
        parts.append(_experts(history, number))
        parts.append(_health(history))
        parts.append(_sample(history))
    return _PAGE.format(title=html.escape(title), body="\n".join(part for part in parts if part))


def _table(title: str, histories: list[History], rows: dict[str, list[str]]) -> str:
    header = "".join(f"<th>{_named(history)}</th>" for history in histories)
    body = "".join(
        f"<tr><th>{html.escape(name)}</th>{''.join(f'<td>{html.escape(value)}</td>' for value in values)}</tr>\n"
        for name, values in rows.items()
    )
    return f'<h2>{html.escape(title)}</h2>\n<div class="wide"><table><tr><th></th>{header}</tr>\n{body}</table></div>'


def _named(history: History) -> str:
    """A run's name behind a dot in its colour."""
    return f'<span class="dot" style="background:{history.colour}"></span>{html.escape(printable(history.label))}'


def _experts(history: History, number: int) -> str:
    if history.loads is None:
        return ""
    figure = svg(replace(history.loads, name=f"experts-{number}"))
    title, sentence = f"Experts of {printable(history.label)}", html.escape(history.loads.sentence)
    return f'<h2>{html.escape(title)}</h2>\n<figure class="double">{figure}</figure>\n<p>{sentence}</p>'


def _health(history: History) -> str:
    if not history.health:
        return ""
    shown = history.health[-50:]
    items = "".join(f"<li>{html.escape(record['sentence'])}</li>\n" for record in shown)
    note = f" (last 50 of {len(history.health)})" if len(history.health) > 50 else ""
    return f"<h2>Health of {html.escape(history.label)}{note}</h2>\n<ul>{items}</ul>"


def _sample(history: History) -> str:
    if not history.samples:
        return ""
    last = history.samples[-1]
    return f"<h2>Sample of {html.escape(history.label)} at step {last['step']:,}</h2>\n<pre>{html.escape(last['text'])}</pre>"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title} · tiglon report</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; }}
body {{ max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.1rem; margin-top: 2rem; }}
.wide {{ overflow-x: auto; }} table {{ border-collapse: collapse; }}
th, td {{ text-align: left; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid #e5e5e5; }}
th, td {{ vertical-align: top; min-width: 5rem; max-width: 16rem; overflow-wrap: break-word; }}
td {{ font-variant-numeric: tabular-nums; }} tr > th:first-child {{ font-weight: 500; color: #666; min-width: 9rem; }}
h1, li, th {{ overflow-wrap: anywhere; }} .runs {{ list-style: none; padding: 0; }}
figure {{ display: inline-block; width: 520px; max-width: 100%; margin: .5rem 0; vertical-align: top; }}
figure.double {{ width: 1050px; }} figure svg {{ width: 100%; height: auto; }}
pre {{ background: #f6f6f4; padding: 1rem; overflow-x: auto; }}
.dot {{ display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .4em; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""
