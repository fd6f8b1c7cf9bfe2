"""`tiglon prepare` as a user runs it."""

import json
from pathlib import Path

import typer
from typer.testing import CliRunner

from data.corpus.shards import read_corpus_manifest
from data.tokenizer.tokenizer import Tokenizer
from launch.commands.prepare import format_tokens, prepare_command


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


def test_one_is_no_plural():
    assert (format_tokens(1, 1), format_tokens(1234, 2)) == ("1 token in 1 shard", "1,234 tokens in 2 shards")
