"""`tiglon prepare` as a user runs it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from data.corpus.shards import read_corpus_manifest
from data.ingest.prepare import PrepareProgress
from data.tokenizer.tokenizer import Tokenizer
from launch.commands.prepare import _progress_text, format_tokens, prepare_command


def run(*words: object) -> str:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(prepare_command)
    result = CliRunner().invoke(
        app, [str(word) for word in words], env={"COLUMNS": "200", "TERM": "dumb"}, catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    return result.output


def test_what_it_prints_is_what_it_wrote(corpus: Path, tmp_path: Path):
    texts = [f"return {number} for self in range\n" for number in range(50)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in [*texts, "", texts[0]]))
    options = ("--tokenizer", corpus / "tokenizer", "--output", tmp_path / "out", "--field", "body", "--deduplicate")
    output = run(tmp_path / "x.jsonl", *options, "--validation-fraction", 0.3)
    assert "50 documents, " in output
    assert "documents left out: 1 empty" in output
    tokenizer, total = Tokenizer.load(str(corpus / "tokenizer")), 0
    for part in ("train", "validation"):
        manifest = read_corpus_manifest(str(tmp_path / "out" / part))
        tokens = sum(shard.tokens for shard in manifest.shards)
        assert tokens and f"wrote {tmp_path}/out/{part}: {format_tokens(tokens, len(manifest.shards))}" in output
        total += tokens
    assert total == sum(len(tokenizer.encode(text)) + 1 for text in texts), "one token ends each document"


def test_what_is_refused_leaves_no_bar(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "x.txt").write_text("def")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer at .*`tiglon tokenizer train`, or `tiglon tokenizer import`"):
        prepare_command([str(tmp_path / "x.txt")], str(tmp_path), str(tmp_path / "out"))
    assert capsys.readouterr().out.strip() == ""


def test_progress_has_units_and_says_what_is_left():
    """It gave 1 MB of 1.3, and two times of which nobody could say what they were."""
    now = PrepareProgress(done_tasks=1, tasks=4, done_bytes=1_300_000, bytes=5_200_000, tokens=1, seconds=2.0)
    assert _progress_text(now) == "1.3 MB, 650 kB/s, 1 token, ETA 6s"
    assert _progress_text(replace(now, done_bytes=5_200_000)) == "5.2 MB, 2.6 MB/s, 1 token, in 2s"


def test_one_is_no_plural():
    assert (format_tokens(1, 1), format_tokens(1234, 2)) == ("1 token in 1 shard", "1,234 tokens in 2 shards")
