"""The data commands as a user runs them."""

import json
import random
import shutil

import pytest
import typer
from typer.testing import CliRunner

from data.corpus.shards import read_corpus_manifest
from launch.checkpoints import read_meta
from launch.commands.data import data_app
from launch.commands.prepare import prepare_command
from launch.commands.tokenizer import tokenizer_app
from launch.load_config import load_config
from tests.launch.conftest import save_checkpoint

DRAW = random.Random(0)
WORDS = ["".join(DRAW.choices(["ka", "to", "mi", "ren", "sol", "ve", "lin", "dor"], k=3)) for _ in range(100)]
TEXT = [f"def function_{n}(value):\n    return " + " + ".join(DRAW.choices(WORDS, k=9)) + "\n" for n in range(300)]


@pytest.fixture(scope="module")
def app():
    app = typer.Typer(pretty_exceptions_enable=False)
    app.add_typer(tokenizer_app, name="tokenizer")
    app.add_typer(data_app, name="data")
    app.command("prepare")(prepare_command)
    return app


def run(app, *words):
    return CliRunner().invoke(
        app, [str(word) for word in words], env={"COLUMNS": "120", "TERM": "dumb"}, catch_exceptions=False
    )


def test_from_text_to_a_proof(tmp_path, app):
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in [*TEXT, ""]))
    told = run(
        app, "tokenizer", "train", tmp_path / "x.jsonl", "--vocab-size", 330, "--output", tmp_path / "t", "--field", "body"
    )
    assert told.exit_code == 0 and "330 pieces" in told.output and "bytes per token" in told.output
    options = ["--tokenizer", tmp_path / "t", "--output", tmp_path / "out", "--field", "body", "--validation-fraction", 0.2]
    told = run(app, "prepare", tmp_path / "x.jsonl", *options)
    assert told.exit_code == 0 and "300 documents" in told.output and "documents left out: 1 empty" in told.output
    told = run(app, "data", "audit", tmp_path / "out" / "train", "--tokenizer", tmp_path / "t", "--samples", 2)
    assert told.exit_code == 0 and "every shard has the size" in told.output and told.output.count("function_") > 1
    shard = tmp_path / "out" / "train" / read_corpus_manifest(str(tmp_path / "out" / "train")).shards[0].file
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    told = run(app, "data", "audit", tmp_path / "out" / "train")
    assert told.exit_code == 1 and "FAULT" in told.output and "checksum" in told.output


def test_the_plan_of_a_run(tmp_path, corpus, app):
    shards = f'train = "{corpus}/shards/train"\nvalidation = "{corpus}/shards/validation"\n'
    (tmp_path / "run.toml").write_text(f'[data]\ntokenizer = "{corpus}/tokenizer"\n{shards}')
    words = ["train.steps=40", "train.sequence_length=32", "model.vocab_size=330", "--picture", tmp_path / "mixture.png"]
    told = run(app, "data", "audit", tmp_path / "run.toml", *words)
    assert told.exit_code == 0 and "exact" in told.output and "NOT EXACT" not in told.output
    assert (tmp_path / "mixture.png").stat().st_size > 1000
    with pytest.raises(ValueError, match=r"\.png or \.svg"):
        run(app, "data", "audit", tmp_path / "run.toml", "train.steps=2", "--picture", "x.txt")


def test_a_run_is_named_as_train_names_it(tmp_path, corpus, app, monkeypatch):
    """A shipped configuration, from its own paths; shards in a folder of its name are shards."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokenizer").symlink_to(corpus / "tokenizer")
    (tmp_path / "corpus").symlink_to(corpus / "shards")
    told = run(app, "data", "audit", "gpt-124m", "train.sequence_length=64", "train.steps=2", "--samples", 0)
    assert told.exit_code == 0 and "epochs" in told.output
    (tmp_path / "gpt-124m").symlink_to(corpus / "shards/train")
    told = run(app, "data", "audit", "gpt-124m")
    assert told.exit_code == 0 and told.output.startswith("gpt-124m: ") and "epochs" not in told.output


def test_an_empty_split_is_called_empty(tmp_path, corpus, app):
    """It showed three excerpts of nothing."""
    (tmp_path / "x.txt").write_text("def")
    options = ("--tokenizer", corpus / "tokenizer", "--output", tmp_path / "out")
    assert run(app, "prepare", tmp_path / "x.txt", *options).exit_code == 0
    told = run(app, "data", "audit", tmp_path / "out/validation", "--tokenizer", corpus / "tokenizer")
    shown = " ".join(told.output.split())
    assert told.exit_code == 0 and shown.endswith("no run can read it: prepare with another --validation-fraction"), shown
    assert "..." not in shown and "every shard" not in shown
    told = run(app, "data", "audit", tmp_path / "out/train", "--tokenizer", corpus / "tokenizer")
    assert "every shard has" in told.output and "..." in told.output


@pytest.mark.parametrize("samples", [-1, 10_001, 10**30])
def test_how_many_excerpts(corpus, app, samples):
    with pytest.raises(ValueError, match=f"--samples {samples}: give 0 to 10,000"):
        run(app, "data", "audit", corpus / "shards/train", "--samples", samples)


@pytest.mark.parametrize(
    "words",
    [
        ["tokenizer", "train", "", "--output", "o"],
        ["tokenizer", "train", "x", "", "--output", "o"],
        ["tokenizer", "train", "x", "--output", ""],
        ["tokenizer", "import", "", "--output", "o"],
        ["tokenizer", "import", "x", "--output", ""],
        ["prepare", "", "--tokenizer", "t", "--output", "o"],
        ["prepare", "x", "--tokenizer", "", "--output", "o"],
        ["prepare", "x", "--tokenizer", "t", "--output", ""],
        ["data", "import", "", "--tokenizer", "t", "--output", "o"],
        ["data", "import", "x", "--tokenizer", "", "--output", "o"],
        ["data", "import", "x", "--tokenizer", "t", "--output", ""],
        ["data", "audit", ""],
    ],
)
def test_an_empty_name_is_refused(app, words, tmp_path, monkeypatch):
    """As "$UNSET" gives it: it was the working directory, or the root."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").write_text("text")
    told = run(app, *words)
    assert told.exit_code == 2 and "it is empty, name a file or a directory" in " ".join(told.output.split())
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def audited(app, *words) -> tuple[int, int, str]:
    """Exit status, samples read and output of the audit of a run over one corpus."""
    told = run(app, "data", "audit", *words, "--samples", 0)
    [row] = [line for line in told.output.splitlines() if "exact" in line]
    return told.exit_code, int(row.split("│")[3]), told.output


SHORT = ["train.steps=8", "train.global_batch_size=4"]


def test_a_run_is_audited_as_it_will_go_on(tmp_path, app, configuration):
    """4 batches of 4 and 4 of 8, or of 4, 2 and 8: by its file, its directory, as another run, and where it was moved."""
    path = save_checkpoint(load_config(configuration, SHORT), 4)
    other = [configuration, f"run.dir={tmp_path}/other", f"checkpoint.resume={path}"]
    larger, ramped = "train.global_batch_size=8", "train.batch_ramp=[[4,4],[6,2]]"
    for target in ([configuration], [tmp_path / "run"], other):
        for options, samples in (([SHORT[1]], 32), ([larger], 48), ([larger, ramped], 36), (["train.global_batch_size=2"], 24)):
            words = [*target, "train.steps=8", *options]
            assert audited(app, *words)[:2] == (0, samples), words
    assert audited(app, configuration, larger, "train.steps=8", "checkpoint.resume=never")[:2] == (0, 64)
    assert audited(app, configuration, larger, f"run.dir={tmp_path}/new", "train.steps=8")[:2] == (0, 64)
    fresh = [f"run.dir={tmp_path}/new", f"checkpoint.resume={path}", "checkpoint.reset_optimizer=true"]
    status, samples, told = audited(app, configuration, larger, "train.steps=8", *fresh)
    assert (status, samples) == (0, 64) and "step 4" not in told
    (tmp_path / "run").rename(tmp_path / "moved")
    assert audited(app, tmp_path / "moved", larger)[:2] == (0, 48)
    status, samples, told = audited(app, tmp_path / "moved", "checkpoint.resume=never")
    assert (status, samples) == (0, 32) and "moved/checkpoints/step-00000004, step 4, was trained by this plan" in told


def test_a_file_of_before_says_less_of_the_past_than_the_checkpoint(tmp_path, app, configuration):
    """RUN/config.toml of an earlier tiglon kept the ramp that was given: 2 until batch 2, then 8."""
    before = load_config(configuration, ["train.steps=8", "train.batch_ramp=[[2,2],[4,4]]"])
    save_checkpoint(before, 6)
    file = tmp_path / "run/config.toml"
    file.write_text(file.read_text().replace("[[2, 2], [4, 4]]", "[[2, 2]]"))
    assert load_config(file).train.batch_ramp == [(2, 2)]
    status, samples, told = audited(app, tmp_path / "run")
    assert (status, samples) == (0, 2 * 2 + 2 * 4 + 4 * 8) and "was trained by this plan" in told
    status, _, told = audited(app, tmp_path / "run", "train.batch_ramp=[[3,2]]")
    assert (
        status == 1
        and "the 6 batches so far were 2 until batch 2, then 4 until batch 4, then 8 and are 2 until batch 3"
        in " ".join(told.split())
    )


def test_batches_that_rewinds_left_behind_are_counted_apart(tmp_path, app, configuration):
    """Step 6 of 9 is batch 10: 2 batches of 4 and 2 of 8 were left behind, of the 12 x 4 + 1 x 8 that are read."""
    ramped = load_config(configuration, ["train.steps=9", "train.batch_ramp=[[8,4]]"])
    path = save_checkpoint(ramped, 6, 10, tokens=32 * 6 * 4)
    status, samples, told = audited(app, tmp_path / "run")
    assert (status, samples) == (0, 8 * 4 + 5 * 8)
    assert f"{path}, step 6, was trained by this plan, but for 4 batches (24 samples) of the 10 it read" in " ".join(
        told.split()
    )
    assert read_meta(path).extra["batch"] == 10
    phase = "data.curriculum=[{from_step=%d,sources=[{path='%s'}]}]"
    told = run(app, "data", "audit", tmp_path / "run", phase % (9, ramped.data.validation or ramped.data.train), "--samples", 0)
    assert told.exit_code == 1 and "with from_step = 10, the next batch)" in " ".join(told.output.split())


def test_a_run_without_a_checkpoint_has_no_past(tmp_path, app, configuration):
    save_checkpoint(load_config(configuration, SHORT), 4)
    shutil.rmtree(tmp_path / "run/checkpoints")
    status, samples, told = audited(app, tmp_path / "run")
    assert (status, samples) == (0, 32)
    assert told.endswith(f"{tmp_path}/run has no checkpoint yet: nothing that was trained to compare with the plan\n")


def test_a_picture_of_shards_alone_is_refused(corpus, app):
    ended = CliRunner().invoke(app, ["data", "audit", str(corpus / "shards/train"), "--picture", "mixture.png"])
    assert isinstance(ended.exception, ValueError) and "give the run or its TOML file" in str(ended.exception)


@pytest.mark.parametrize(
    "command", [["tokenizer", "train"], ["tokenizer", "import"], ["prepare"], ["data", "import"], ["data", "audit"]]
)
def test_help_shows_an_example_and_fits_a_screen(app, command):
    told = run(app, *command, "--help")
    assert told.exit_code == 0 and f"tiglon {' '.join(command)} " in told.output
    assert len(told.output.splitlines()) <= 40
