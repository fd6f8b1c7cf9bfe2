"""The Python interface, and the script of docs/python.md as it stands there."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

import tiglon
from launch.commands.export import export_model
from launch.commands.import_model import import_model
from launch.trained import open_checkpoint
from tests.launch.conftest import configuration, corpus, run_directory  # noqa: F401 (fixtures)
from tests.model.huggingface.stock import Case, save_stock

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
ROWS = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]]


def python(script: str, directory: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run a script as a user would, in a directory."""
    variables = {**ENVIRONMENT, **environment}
    return subprocess.run(
        [sys.executable, "-c", script], cwd=directory, env=variables, capture_output=True, text=True, timeout=120
    )


def test_the_script_of_the_page_runs_as_it_stands(configuration: str, corpus: Path, tmp_path: Path):  # noqa: F811
    (script,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(), re.DOTALL)
    overrides = ["run.dir=runs/quickstart", f"data.validation={corpus}/shards/validation"]
    train = f"import tiglon; tiglon.train({configuration!r}, {overrides})"
    done = python(f"{train}\n{script}", tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("<tiglon.Model runs/quickstart/checkpoints/step-00000012, position rope, cpu> after 12 steps")
    assert "logits (2, 32, 330) loss 5." in lines[1]
    losses = [float(line.rpartition(" ")[2]) for line in lines[2:4]]
    assert losses[0] != losses[1] and all(4 < loss < 6 for loss in losses)
    assert [line.partition(":")[0] for line in lines[4:6]] == ["16 tokens", "32 tokens"]
    assert lines[-1].startswith(
        "TrainingResult(directory='runs/more', step=17, checkpoint='runs/more/checkpoints/step-00000017')"
    )
    assert lines[-1].rpartition(" ")[2] != lines[1].rpartition(" ")[2]


def test_logits_and_loss_are_those_of_the_network(run_directory: Path):  # noqa: F811
    model = tiglon.load(run_directory, "cpu")
    trained = open_checkpoint(str(run_directory), torch.device("cpu"))
    ids = torch.tensor(ROWS)
    logits = model.logits(ROWS)
    assert (model.step, model.path, model.config) == (trained.step, trained.path, trained.config)
    assert logits.dtype == torch.float32 and not logits.requires_grad
    with torch.no_grad():
        assert torch.equal(logits, trained.decoder(ids)) and torch.equal(logits, model.logits(ids.to(torch.int32)))
    want = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert model.loss(ROWS) == pytest.approx(want.item(), rel=1e-6)


def test_another_position_map_or_precision_gives_other_numbers(run_directory: Path):  # noqa: F811
    model = tiglon.load(run_directory)
    windowed = model.with_position({"kind": "rerope", "window": 2})
    assert windowed.position == tiglon.PositionConfig(kind="rerope", window=2)
    assert tiglon.load(run_directory, position=windowed.position).loss(ROWS) == windowed.loss(ROWS) != model.loss(ROWS)
    coarse = tiglon.load(run_directory, dtype=torch.bfloat16)
    assert coarse.logits(ROWS).dtype == torch.float32
    assert coarse.loss(ROWS) == pytest.approx(model.loss(ROWS), rel=1e-2) and coarse.loss(ROWS) != model.loss(ROWS)


def test_generation_continues_text_and_ids_alike(run_directory: Path):  # noqa: F811
    model = tiglon.load(run_directory)
    words = model.tokenizer
    ids = model.generate([words.end_of_text, *words.encode("def return")], 12, seed=3)
    assert len(ids) == 12 and model.generate("def return", 12, seed=3) == words.decode(ids)
    assert model.generate("def return", 12, seed=4) != words.decode(ids)
    greedy = model.generate(ROWS[0], 4, temperature=0)
    assert greedy[0] == int(model.logits([ROWS[0]])[0, -1, : words.vocab_size].argmax())


def test_evaluation_is_that_of_the_command(run_directory: Path):  # noqa: F811
    model = tiglon.load(run_directory)
    (whole,) = model.evaluate()
    short, trained = model.evaluate([32, 16], tokens=256)
    assert (whole.tokens, whole.context) == (512, 32) and (short.context, trained.context) == (16, 32)
    assert all(5 < score.loss < 7 for score in (whole, short, trained))
    chunked = model.evaluate([32, 16], tokens=256, chunk_tokens=12)
    assert [score.loss for score in chunked] == pytest.approx([short.loss, trained.loss], rel=1e-6)
    assert [score.loss for score in chunked] != [short.loss, trained.loss]  # sums in another order


@pytest.mark.parametrize(
    ("ids", "sentence"),
    [
        ([[1, 2], [3]], "ids must be rows of equal length"),
        ([1, 2, 3], r"got int64 of shape \[3\]"),
        ([[]], "at least one"),
        ([[1.0, 2.0]], "got float32"),
        ([[1, 330]], "ids must lie between 0 and 329, got 330"),
        ([[1, -100]], "got -100"),
        ([[1]], "leave nothing to predict"),
    ],
)
def test_ids_that_are_none_are_one_sentence(run_directory: Path, ids: Any, sentence: str):  # noqa: F811
    with pytest.raises(ValueError, match=sentence) as caught:
        tiglon.load(run_directory).loss(ids)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_loaded_is_one_sentence(run_directory: Path, tmp_path: Path):  # noqa: F811
    cases: list[tuple[type[Exception], str, Any]] = [
        (FileNotFoundError, "is neither a checkpoint nor a run", lambda: tiglon.load(tmp_path / "none")),
        (ValueError, "the device 'tpu' is unknown", lambda: tiglon.load(run_directory, "tpu")),
        (ValueError, "dtype = torch.float16; legal", lambda: tiglon.load(run_directory, dtype=torch.float16)),
        (ValueError, "needs window >= 1", lambda: tiglon.load(run_directory, position={"kind": "rerope"})),
        (ValueError, "unknown key windov", lambda: tiglon.load(run_directory, position="rerope,windov=2")),
        (ValueError, "exceed the 32", lambda: tiglon.load(run_directory).generate("def", 99)),
        (ValueError, "unknown key train.stesp", lambda: tiglon.train({"train": {"stesp": 1}})),
        (
            FileNotFoundError,
            "a shipped one's name: continue-llama, deepseek-v2-lite, gpt-124m",
            lambda: tiglon.train("quickstrat"),
        ),
        (ValueError, "train.steps = 'soon'", lambda: tiglon.train(tiglon.RunConfig(), ["train.steps=soon"])),
    ]
    for kind, sentence, call in cases:
        with pytest.raises(kind, match=re.escape(sentence)) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_what_is_public_exists_and_nothing_else_is_offered():
    for name in tiglon.__all__:
        assert getattr(tiglon, name).__doc__ or name == "__version__"
        assert f"`{name}`" in (page := (ROOT / "docs/python.md").read_text()) or f"`{name}(" in page or name == "TrainingResult"
    with pytest.raises(AttributeError, match="module 'tiglon' has no attribute 'trian'"):
        tiglon.trian  # noqa: B018


def test_the_import_does_not_wait_for_torch(tmp_path: Path):
    done = python("import sys, tiglon; print(*sys.modules)", tmp_path)
    assert done.returncode == 0 and not {"torch", "numpy", "pydantic", "typer"} & set(done.stdout.split())


@pytest.mark.parametrize("name", ["data.py", "model.py", "trainer/__init__.py", "launch.py"])
def test_a_file_in_the_way_is_named(tmp_path: Path, name: str):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("print('somebody else')\n")
    done = python("import tiglon", tmp_path, PYTHONSAFEPATH="")
    package = name.partition("/")[0].removesuffix(".py")
    sentence = f"ImportError: tiglon needs its package '{package}', but {tmp_path}/{name} comes first on sys.path; rename it"
    assert sentence in done.stderr and "somebody else" not in done.stdout


def test_folders_of_text_are_in_nobody_s_way(tmp_path: Path):
    """As where tiglon is installed from a checkout, whose folder is then not on sys.path."""
    finder = f"""
import sys
from importlib.machinery import PathFinder
class Installed:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return PathFinder.find_spec(name, [{str(ROOT)!r}])
sys.meta_path.append(Installed)
import tiglon, launch.trained, model.config, trainer.state, data.config
print(launch.__file__, data.__file__)
"""
    for name in ("data", "launch", "model"):
        (tmp_path / name).mkdir()
    done = python(finder, tmp_path, PYTHONPATH="", PYTHONSAFEPATH="")
    assert done.returncode == 0 and done.stdout.split() == [f"{ROOT}/{name}/__init__.py" for name in ("launch", "data")], (
        done.stderr
    )


def test_an_imported_checkpoint_brings_its_tokenizer(run_directory: Path, tmp_path: Path):  # noqa: F811
    here = tiglon.load(run_directory)
    export_model(here.path, tmp_path / "exported")
    import_model(tmp_path / "exported", tmp_path / "imported")
    imported = tiglon.load(tmp_path / "imported")
    assert imported.step == 0 and imported.loss(ROWS) == pytest.approx(here.loss(ROWS), rel=1e-3)  # it is kept in bf16
    assert imported.config.data.tokenizer == ""
    assert imported.tokenizer.encode("def return") == here.tokenizer.encode("def return")
    assert imported.generate("def", 3)


def test_ids_need_no_tokenizer(tmp_path: Path):
    """A model without a tokenizer, imported."""
    save_stock(Case("qwen3", "plain"), tmp_path / "stock")
    import_model(tmp_path / "stock", tmp_path / "in")
    model = tiglon.load(tmp_path / "in")
    sampled = model.generate([5, 6, 7], tokens=4, temperature=0)
    assert len(sampled) <= 4 and all(0 <= token < 96 for token in sampled)
    with pytest.raises((FileNotFoundError, ValueError), match="names no tokenizer"):
        model.generate("a text", tokens=4)
