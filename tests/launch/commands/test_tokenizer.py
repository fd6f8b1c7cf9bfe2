"""`tiglon tokenizer train` and `tiglon tokenizer import` as a user runs them."""

import json
from pathlib import Path

from typer.testing import CliRunner

from data.tokenizer.tokenizer import Tokenizer
from launch.commands.tokenizer import tokenizer_app
from tests.launch.commands.test_data import TEXT


def run(*words: object) -> str:
    result = CliRunner().invoke(
        tokenizer_app, [str(word) for word in words], env={"COLUMNS": "120", "TERM": "dumb"}, catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    return result.output


def test_train_from_a_field_then_import_what_it_made(tmp_path: Path):
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"body": text, "text": "?"}) + "\n" for text in TEXT))
    output = run("train", tmp_path / "x.jsonl", "--vocab-size", 330, "--output", tmp_path / "one", "--field", "body")
    assert f"wrote {tmp_path}/one: 330 pieces, fingerprint " in output
    one = Tokenizer.load(str(tmp_path / "one"))
    ids = one.encode(TEXT[7])
    assert one.decode(ids) == TEXT[7] and len(ids) < 0.8 * len(TEXT[7]), "trained on `body`, not on `text`"
    row = next(line for line in output.splitlines() if str(tmp_path / "x.jsonl") in line or "300" in line)
    bytes_per_token = sum(len(text) for text in TEXT) / sum(len(one.encode(text)) + 1 for text in TEXT)
    assert f" {bytes_per_token:.2f} " in row
    (tmp_path / "stock.model").write_bytes(one.model)
    output = run("import", tmp_path / "stock.model", "--output", tmp_path / "two", "--end-of-text", "<|end_of_text|>")
    assert f"wrote {tmp_path}/two: 330 pieces, separator {one.end_of_text}" in output
    assert Tokenizer.load(str(tmp_path / "two")).encode(TEXT[7]) == ids
    output = run("import", tmp_path / "stock.model", "--output", tmp_path / "three", "--begin-of-text", "<|end_of_text|>")
    assert f"separator {one.end_of_text}, beginning {one.end_of_text}" in " ".join(output.split())
    assert Tokenizer.load(str(tmp_path / "three")).begin_of_text == one.end_of_text


def test_a_field_of_one_input_is_none_of_another(tmp_path: Path):
    """The table measures each input alone, where the field of another one is for no file."""
    for name, field, texts in (("a.jsonl", "body", TEXT[:200]), ("b.jsonl", "text", TEXT[200:])):
        (tmp_path / name).write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
    output = run(
        "train", tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--vocab-size", 330, "--output", tmp_path / "one",
        "--field", "a.jsonl=body",
    )  # fmt: skip
    assert "│ 200 " in output and "│ 100 " in output
