"""The report: plots and one page that needs nothing but itself."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from data.storage import replace_file

pytest.importorskip("matplotlib")  # a GPU machine without network may lack it

from launch.commands.report import (
    config_differences,
    plots,
    read_histories,
    read_history,
    report_page,
    run_summary,
    without_rewound,
    write_report,
)
from launch.plots.figures import Plot, svg
from launch.run_end import record_failure
from launch.stop import record_stop
from trainer.monitoring.config import LogConfig
from trainer.monitoring.metrics import Metrics


def write_run(directory: Path, steps: int = 60, scale: float = 1.0, name: str = "validation") -> Path:
    """A run directory as training leaves it."""
    metrics = Metrics(replace_file, directory, LogConfig(tensorboard=False), config={})
    for step in range(1, steps + 1):
        loss = scale * (2 + 6 * math.exp(-step / 20))
        metrics.record(
            {
                "kind": "train",
                "step": step,
                "tokens": 1000 * step,
                "loss": loss,
                "grad_norm": 1 / step,
                "learning_rate": 1e-3 * min(1, step / 10),
                "tokens_per_second": 5000.0,
                "step_seconds": 0.2,
                "mfu": 0.4,
                "mfu_full": 0.5,
                "memory_bytes": 2**30,
                "data_share": 0.1,
                "compute_share": 0.9,
            }
        )
        if step % 20 == 0:
            metrics.record({"kind": "evaluate", "step": step, "name": name, "context": 256, "loss": loss + 0.1})
    metrics.record({"kind": "health", "step": 5, "what": "spike", "action": "go", "sentence": "step 5: a <spike>"})
    metrics.text("sample", "def f(a < b):", steps)
    metrics.close()
    (directory / "config.toml").write_text(f"[run]\ndir = '{directory}'\n[optimizer.tiger]\nlearning_rate = {scale}\n")
    return directory


class _Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]):
        for key, value in attrs:
            if key in ("src", "href", "xlink:href", "data", "action") and not (value or "").startswith(("#", "data:")):
                self.fetched.append(f"{tag} {key}={value}")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """Two runs of the same name, and the page that compares them."""
    folder = tmp_path_factory.mktemp("runs")
    one, other = write_run(folder / "a" / "run"), write_run(folder / "b" / "run", scale=1.5)
    path = write_report(read_histories([str(one), str(other)]))
    assert path == one / "report" / "report.html"
    return one, other, path.read_text()


def test_logit_bounds_are_drawn_where_a_run_has_them(tmp_path: Path):
    history = read_history(write_run(tmp_path / "one"), "one", "red")
    without = [figure.name for figure in plots([history])]
    for record in history.train:
        record["logit_bound"] = 2.0 * record["step"]
    (added,) = [figure for figure in plots([history]) if figure.name not in without]
    assert isinstance(added, Plot) and added.name == "logit_bound" and added.curves[0].y[:3] == [2.0, 4.0, 6.0]


def test_loads_of_experts_are_drawn_where_a_run_has_them(tmp_path: Path):
    one, other = write_run(tmp_path / "one"), write_run(tmp_path / "other")
    with open(one / "metrics.jsonl", "a") as file:
        for name, load in (("layer-1", [0.75, 0.25]), ("layer-<2>", [0.5, 0.5])):
            ends = {"largest": 2 * max(load), "smallest": 2 * min(load)}
            file.write(json.dumps({"kind": "experts", "step": 60, "name": name, **ends, "load": load}) + "\n")
    page = write_report(read_histories([str(one), str(other)])).read_text()
    assert (one / "report" / "experts.png").is_file() and not (other / "report" / "experts.png").exists()
    assert "expert 0 of layer-1 gets 1.50 times an even load" in page and "<2>" not in page
    assert "Experts of one" in page and "Experts of other" not in page


def test_plots_and_page_of_two_runs(two: tuple[Path, Path, str]):
    *runs, text = two
    for run in runs:
        for name in ("loss", "learning_rate", "grad_norm", "throughput", "time"):
            assert (run / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert text.count("<svg ") == 5
    assert "learning_rate" in text and "Configuration that differs" in text
    assert "step 5: a &lt;spike&gt;" in text and "def f(a &lt; b):" in text


def test_runs_of_the_same_name_are_told_apart_by_their_path(two: tuple[Path, Path, str]):
    *runs, text = two
    assert all(str(run) in text for run in runs)


def test_the_page_fetches_nothing(two: tuple[Path, Path, str]):
    links = _Links()
    links.feed(two[2])
    assert links.fetched == []
    assert "<script" not in two[2] and "@import" not in two[2] and not re.search(r"url\((?!#)", two[2])


def test_ids_are_unique_in_the_page(two: tuple[Path, Path, str]):
    ids = re.findall(r'\bid="([^"]+)"', two[2])
    assert len(ids) > 50 and len(set(ids)) == len(ids)
    used = set(re.findall(r'href="#([^"]+)"', two[2])) | set(re.findall(r"url\(#([^)]+)\)", two[2]))
    assert used and used <= set(ids)


def test_the_same_plot_makes_the_same_bytes(two: tuple[Path, Path, str]):
    loss = plots([read_history(two[0], "one", "red")])[0]
    assert svg(loss) == svg(loss)


def test_summary_tells_the_figures(tmp_path: Path):
    row = run_summary(read_history(write_run(tmp_path / "one"), "one", "red"))
    assert row["steps"] == "60" and row["tokens"] == "60.0k" and row["MFU, causal"] == "40.0 %"
    loss = 2 + 6 * math.exp(-3) + 0.1
    assert row["validation, 256 tokens"] == f"{loss:.4f} (perplexity {math.exp(loss):.2f})"
    assert row["peak memory of rank 0"] == "1.07 GB" and row["median step"] == "200 ms" and row["health records"] == "1"


def test_only_keys_that_differ_are_shown(tmp_path: Path):
    one, two = (read_history(write_run(tmp_path / name, scale=scale), name, "red") for name, scale in (("a", 1.0), ("b", 2.0)))
    assert config_differences([one, two]) == {"optimizer.tiger.learning_rate": ["1.0", "2.0"]}


def test_what_a_rewind_undid_is_not_drawn():
    records = [{"kind": "train", "step": step, "loss": loss} for loss, step in enumerate([10, 20, 30, 20, 30])]
    assert [record["loss"] for record in without_rewound(records, "train")] == [0, 1, 3, 4]


def test_evaluating_an_earlier_checkpoint_undoes_nothing():
    """`tiglon evaluate RUN/checkpoints/step-00000010 --output RUN`, after the run has evaluated itself at 20."""
    record = {"kind": "evaluate", "name": "validation"}
    records = [{**record, "step": step} for step in (10, 20)]
    afterwards = {**record, "step": 10, "checkpoint": "run/checkpoints/step-00000010"}
    after = {**record, "step": 30}
    assert without_rewound([*records, afterwards, after], "evaluate") == [records[0], afterwards, records[1], after]


def test_a_rewound_evaluation_of_several_contexts_keeps_each_context():
    records = [
        {"kind": "evaluate", "step": step, "name": "v", "context": context} for step in (10, 20) for context in (256, 512)
    ]
    assert without_rewound(records, "evaluate") == records


def test_validation_stands_at_its_tokens(tmp_path: Path):
    loss = plots([read_history(write_run(tmp_path / "one"), "one", "red")])[0]
    assert isinstance(loss, Plot)
    assert loss.marks[0].x == [20000, 40000, 60000]


def test_the_page_says_how_each_run_stands(tmp_path: Path):
    """A run that had crashed looked like one that was finished."""
    done, stopped, failed = (write_run(tmp_path / name) for name in ("done", "stopped", "failed"))
    for run in (done, stopped, failed):
        steps = 60 if run is done else 2000
        (run / "config.toml").write_text(f"[resolved.run]\ndir = '{run}'\n[resolved.train]\nsteps = {steps}\n")
    record_stop(stopped, "stopped by SIGTERM at step 60; saved")
    (failed / "logs").mkdir()
    record_failure(failed, "rank 0: step 61: <out of memory>")
    histories = read_histories([str(run) for run in (done, stopped, failed)])
    page = report_page(histories)
    assert "done: step 60 of 60: done<" in page and "stopped: step 60 of 2,000: stopped by SIGTERM at step 60; saved<" in page
    assert "failed: step 60 of 2,000: ended by an error: rank 0: step 61: &lt;out of memory&gt;<" in page
    assert [run_summary(history)["steps"] for history in histories] == ["60 of 60", "60 of 2,000", "60 of 2,000"]


def test_a_loss_that_is_nan_has_no_best_and_no_plot(tmp_path: Path):
    run = write_run(tmp_path / "run", 40)
    text = (run / "metrics.jsonl").read_text().splitlines()
    records = [{**record, "loss": "NaN"} if "loss" in record else record for record in map(json.loads, text)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (history,) = read_histories([str(run)])
    assert run_summary(history)["validation, 256 tokens"] == "nan (perplexity nan)"
    assert [figure.name for figure in plots([history])] == ["learning_rate", "grad_norm", "throughput", "time"]


def test_runs_are_labelled_by_name_and_read_once(tmp_path: Path):
    paths = [str(write_run(tmp_path / name, 3)) for name in ("one", "a/two", "b/two")]
    labels = [history.label for history in read_histories([*paths, f"{paths[0]}/../one"])]
    assert labels == ["one", *paths[1:]]


def test_where_checkpoints_lie_is_no_difference_unless_it_was_chosen(tmp_path: Path):
    histories = []
    for name, kept in (("a", "a/checkpoints"), ("b", "b/checkpoints"), ("c", "s3://bucket/c")):
        run = write_run(tmp_path / name, 3)
        (run / "config.toml").write_text(f"[resolved]\nrun.dir = '{name}'\ncheckpoint.directory = '{kept}'\n")
        histories += read_histories([str(run)])
    assert config_differences(histories[:2]) == {}
    assert config_differences(histories) == {"checkpoint.directory": ["", "", "s3://bucket/c"]}


def test_a_directory_without_metrics_is_one_sentence(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"metrics.jsonl does not exist; give the directory of a run"):
        read_histories([str(tmp_path)])


def test_a_run_without_a_step_is_one_sentence(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "health", "step": 1}\n')
    with pytest.raises(ValueError, match="holds no training step yet"):
        read_histories([str(tmp_path)])


HOSTILE = "<script>alert(1)</script><img src=http://a.example/x> $\\frac{ & \x1b[31m"


def test_what_a_stranger_writes_is_shown_as_text(tmp_path: Path):
    """Names of runs, parts and kinds of work, sentences, samples and values of keys; to matplotlib a $ begins a formula."""
    runs = []
    for number, base in enumerate(("one", "two")):
        run = write_run(tmp_path / f"{base} <script> $\\frac{{ &", 60, name=HOSTILE)
        lines = (run / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        for record in records:
            if record["kind"] == "train":
                record["<script>_share"] = 0.5
            if record["kind"] in ("health", "text"):
                record["sentence" if record["kind"] == "health" else "text"] = HOSTILE
        (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        (run / "config.toml").write_text(f"[data]\n'<script>' = '<script>{number}'\n")
        runs.append(run)
    page = write_report(read_histories([str(run) for run in runs])).read_text()
    links = _Links()
    links.feed(page)
    assert "<script" not in page and "<img" not in page and not links.fetched
    assert page.count("&lt;script&gt;alert(1)") >= 5, "shown, not left out"


EXPERTS = {"kind": "experts", "step": 1, "name": "layer-1", "largest": 1.0, "smallest": 1.0, "load": [1.0]}


@pytest.mark.parametrize(
    "record",
    [
        {"kind": 7}, {}, {"kind": "train"}, {"kind": "train", "step": "1", "tokens": 1, "loss": 1}, {"kind": "text"},
        {"kind": "train", "step": 0, "tokens": 1, "loss": 1.0}, {"kind": "train", "step": 1, "tokens": 10**400, "loss": 1.0},
        {"kind": "train", "step": 1, "tokens": 1, "loss": 1.0, "mfu": "<b>"}, {"kind": "health", "sentence": ["x"]},
        {"kind": "train", "step": 1, "tokens": 1, "loss": 1.0, "x_share": None}, {"kind": "text", "step": 1, "text": 7},
        {"kind": "evaluate", "step": 1, "name": {}, "loss": 1.0}, {"kind": "text", "step": [1], "text": "x"},
        EXPERTS | {"load": []}, EXPERTS | {"load": ["x"]}, EXPERTS | {"load": 1.0}, EXPERTS | {"largest": "x"},
        EXPERTS | {"load": [math.inf]}, EXPERTS | {"name": 1},
    ],
)  # fmt: skip
def test_a_record_that_cannot_be_shown_is_one_sentence(tmp_path: Path, record: dict):
    run = write_run(tmp_path / "run", 3)
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")
    with pytest.raises(ValueError, match=r"has a record .*; remove it"):
        read_histories([str(run)])
    assert not (run / "report").exists()


def test_a_record_that_nests_deeply_is_one_sentence(tmp_path: Path):
    run = write_run(tmp_path / "run", 3)
    with open(run / "metrics.jsonl", "a") as file:
        file.write("[" * 200_000 + "\n")
    with pytest.raises(ValueError, match="is not a JSON record"):
        read_histories([str(run)])
