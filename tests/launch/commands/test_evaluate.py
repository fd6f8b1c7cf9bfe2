"""`tiglon evaluate` on a small checkpoint."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from data.corpus.shards import Corpus
from launch.cli import app
from launch.commands.evaluate import append_records


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def cells(text: str) -> list[list[str]]:
    """The rows of the table: context, tokens, loss, standard error, perplexity."""
    rows = (re.split(r"[^\d.,]+", line.strip("│ \n")) for line in text.splitlines() if line.startswith("│"))
    return [row for row in rows if len(row) == 5]


def test_contexts_as_a_table_records_and_a_plot(run_directory: Path, tmp_path: Path):
    arguments = ("--contexts", "16,32,64", "--position", "rerope,window=8", "--tokens", 200, "--output", tmp_path / "scores")
    text = run("evaluate", run_directory, *arguments)
    rows = cells(text)
    assert [row[:2] for row in rows] == [["16", "200"], ["32", "200"], ["64", "200"]]
    records = [json.loads(line) for line in (tmp_path / "scores/metrics.jsonl").read_text().splitlines()]
    seen = [(record["kind"], record["step"], record["context"], record["tokens"]) for record in records]
    assert seen == [("evaluate", 3, 16, 200), ("evaluate", 3, 32, 200), ("evaluate", 3, 64, 200)]
    assert [f"{record['loss']:.4f}" for record in records] == [row[2] for row in rows]
    assert [f"{record['standard_error']:.4f}" for record in records] == [row[3] for row in rows]
    assert (tmp_path / "scores/contexts.png").read_bytes()[:4] == b"\x89PNG"
    assert "context 64: 200 tokens in 7 rows" in text  # progress


def test_long_contexts_in_chunks_with_progress(run_directory: Path, monkeypatch: pytest.MonkeyPatch):
    """The same losses, and a line after every forward where each takes long."""
    arguments = ("evaluate", run_directory, "--contexts", "16,64", "--tokens", 200)
    whole = cells(run(*arguments))
    monkeypatch.setattr("trainer.monitoring.evaluation_progress.SECONDS", 0.0)
    text = run(*arguments, "--chunk-tokens", 24)
    assert cells(text) == whole
    said = re.findall(r"context 64: (\d+) of (\d+) forwards", text)
    assert said == [(str(done), str(len(said) + 1)) for done in range(1, len(said) + 1)] and len(said) % 3 == 2
    monkeypatch.setattr("launch.runtime.memory_capacity_bytes", lambda *_: 100.0)
    with pytest.raises(ValueError, match="contexts: keys and values of a context of 64 tokens take"):
        run(*arguments, "--chunk-tokens", 24)


@pytest.mark.parametrize("contexts", ["64", "64,256", "64,128,512"])
def test_as_many_tokens_are_scored_whatever_the_contexts(run_directory: Path, contexts: str):
    rows = cells(run("evaluate", run_directory, "--contexts", contexts, "--tokens", 300))
    assert [row[1] for row in rows] == ["300"] * len(contexts.split(","))
    alone = cells(run("evaluate", run_directory, "--contexts", contexts.split(",")[0], "--tokens", 0))
    assert int(alone[0][1].replace(",", "")) > 1000


def test_the_run_says_how_many_tokens_and_never_reads_twice(run_directory: Path, corpus: Path):
    size = Corpus(f"{corpus}/shards/validation").tokens
    assert cells(run("evaluate", run_directory))[0][1] == "512"  # evaluate.tokens of the run
    text = run("evaluate", run_directory, "--tokens", 10 * size)
    assert f"the validation text allows {size:,} of {10 * size:,} tokens: each is scored once" in text
    assert cells(text)[0][:3] == cells(run("evaluate", run_directory, "--tokens", 0))[0][:3]
    assert cells(text)[0][1] == f"{size:,}"


def test_scores_are_added_to_the_metrics_that_are_there(run_directory: Path):
    """The run's own directory is the first that one thinks of; its records of training stay."""
    path = run_directory / "metrics.jsonl"
    before = "".join(json.dumps({"kind": "train", "step": step, "loss": 1.0}) + "\n" for step in (1, 2, 3, 4))
    path.write_text(before)
    run("evaluate", run_directory, "--output", run_directory)
    after = path.read_text()
    assert after.startswith(before) and after.count("\n") == 5


def test_no_record_is_lost_to_scores_and_a_run_goes_on_writing(run_directory: Path):
    """The last record may lack its newline, be torn by a kill, or be about to be followed by the next of a run."""
    path = run_directory / "metrics.jsonl"
    whole = b'{"kind": "train", "step": 9, "loss": 1.0}'
    for last, kept in (
        (whole, whole + b"\n"),
        (whole[:20], b""),
        (b"no JSON at all\n" + whole, b"no JSON at all\n" + whole + b"\n"),
    ):
        path.write_bytes(whole + b"\n" + last)
        with open(path, "ab", buffering=0) as run_going_on:
            run("evaluate", run_directory, "--output", run_directory)
            run_going_on.write(whole + b"\n")
        lines = path.read_bytes().removeprefix(whole + b"\n" + kept).splitlines()
        assert len(lines) == 2 and lines[1] == whole, "one file, which both have written to"
        assert json.loads(lines[0])["checkpoint"] == f"{run_directory}/checkpoints/step-00000003"


def test_a_long_last_record_is_read_whole(tmp_path: Path):
    long = json.dumps({"kind": "text", "step": 1, "text": "x" * 3_000_000}).encode()
    (tmp_path / "metrics.jsonl").write_bytes(long)
    append_records(tmp_path / "metrics.jsonl", [{"kind": "evaluate", "step": 2}])
    assert (tmp_path / "metrics.jsonl").read_bytes() == long + b'\n{"kind": "evaluate", "step": 2}\n'


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("evaluate", "{run}", "--contexts", "8,x"), "--contexts 8,x must be numbers"),
        (("evaluate", "{run}", "--contexts", "1,8"), "--contexts 1,8: a context of 1 must have at least 2 tokens"),
        (("evaluate", "{run}", "--contexts", "8,4,8"), "--contexts 8,4,8: the context 8 is given twice"),
        (("evaluate", "{run}", "--contexts", "8,100000"), "a context of 100,000 tokens is longer than the text at"),
        (("evaluate", "{run}", "--tokens", "-3"), "--tokens -3 must be 0"),
        (("evaluate", "{run}", "--chunk-tokens", "-3"), "chunk_tokens = -3 must be 0"),
        (("evaluate", "/nowhere"), "neither a checkpoint nor a run"),
    ],
)
def test_a_mistake_is_one_sentence(run_directory: Path, arguments: tuple[str, ...], sentence: str):
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(sentence)) as caught:
        CliRunner().invoke(app, [part.format(run=run_directory) for part in arguments], catch_exceptions=False)
    assert "\n" not in str(caught.value)
