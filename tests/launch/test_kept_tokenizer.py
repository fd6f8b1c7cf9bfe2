"""The tokenizer of a model goes through import, generation, preparation, training and export."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from typer.testing import CliRunner

import tiglon
from data.corpus.shards import Corpus
from data.tokenizer.tokenizer import Tokenizer
from launch.checkpoints import read_tensor
from launch.cli import app
from launch.commands.export import export_model
from launch.commands.import_model import import_model
from launch.kept_tokenizer import as_list, kept_tokenizer, open_kept
from launch.load_config import load_config
from launch.train import main
from launch.trained import end_tokens, open_checkpoint, open_tokenizer
from tests.data.conftest import make_documents
from tests.data.tokenizer.published import SIZE, write_published
from tests.model.huggingface.stock import Case, stock_model
from tests.ranks import run_ranks

PROMPT = "the model reads"
CPU = torch.device("cpu")
ARGUMENTS = (
    "run.device=cpu", "train.precision=fp32", "train.steps=2", "train.sequence_length=32", "train.global_batch_size=4",
    "train.micro_batch_size=4", "optimizer.name=adamw", "optimizer.adamw.learning_rate=1e-3", "log.tensorboard=false",
    "log.sample_prompt=def", "evaluate.every_steps=1", "log.sample_tokens=3",
)  # fmt: skip
MORE = {
    "chat_template.jinja": b"{{ messages }}\n", "added_tokens.json": b'{"<|eot_id|>":  449}', "merges.txt": b"#version: 0.2\n",
    "generation_config.json": b'{"eos_token_id": [448, 449],\n "top_k": 0}',
}  # fmt: skip
"""Files beside tokenizer.json whose layout nobody would write again by chance."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock Llama with a tokenizer in the style of Llama 3."""
    folder = tmp_path_factory.mktemp("stock")
    write_published("llama-3", folder, make_documents(200))
    ids = {"vocab_size": SIZE, "bos_token_id": 447, "eos_token_id": 448}
    stock_model(Case("llama", "plain"), **ids).save_pretrained(folder)
    for name, content in MORE.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def imported(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("import") / "in"
    assert len(import_model(model, folder)) == 2
    return folder


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    model_files = ("config.json", "model.safetensors")
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in model_files}


def run(*arguments: Any) -> str:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False).output


def test_generation_is_that_of_transformers(model: Path, imported: Path, tmp_path: Path) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    words = transformers.AutoTokenizer.from_pretrained(model)
    moved = tmp_path / "moved"
    shutil.copytree(imported, moved)
    for prompt in (PROMPT, "def f(x):", "数据"):
        ids = words(prompt, return_tensors="pt").input_ids
        made = theirs.generate(ids, max_new_tokens=12, do_sample=False)[0]
        expected = words.decode(made, skip_special_tokens=True)
        ours = tiglon.load(str(moved), device="cpu", dtype=torch.float32).generate(prompt, 12, temperature=0)
        assert prompt + ours == expected and (len(ours) > 20 or prompt == "数据"), "which ends at once"
    said = run("generate", moved, "--prompt", PROMPT, "--tokens", 12, "--temperature", 0, "--device", "cpu")
    assert said == PROMPT + tiglon.load(str(moved), device="cpu").generate(PROMPT, 12, temperature=0) + "\n"


def test_a_text_ends_at_any_end_token_of_the_model(model: Path, imported: Path, tmp_path: Path) -> None:
    trained = open_checkpoint(str(imported), CPU)
    assert end_tokens(trained, open_tokenizer(trained)) == {448, 449}, "generation_config.json names two"
    bare = tmp_path / "bare"
    shutil.copytree(model, bare)
    (bare / "generation_config.json").unlink()
    config = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps(config | {"eos_token_id": [448, 7, 9]}))
    import_model(bare, tmp_path / "in")
    trained = open_checkpoint(str(tmp_path / "in"), CPU)
    assert end_tokens(trained, open_tokenizer(trained)) == {448, 7, 9}
    assert end_tokens(trained, Tokenizer.load(str(imported / "tokenizer"))) == {448, 449, 7, 9}, "of the model that was read"
    assert (as_list(None), as_list(3), as_list([3])) == ([], [3], [3])


def test_training_goes_on_without_a_word_about_tokenizers(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The import is given by a relative path; another directory is the working directory when it is trained."""
    monkeypatch.chdir(tmp_path)
    import_model(model, Path("in"))
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in make_documents(40, seed=1)))
    run("prepare", "text.jsonl", "--tokenizer", "in/tokenizer", "--output", "shards")
    corpus, tokenizer = Corpus("shards/train"), Tokenizer.load("in/tokenizer")
    words = transformers.AutoTokenizer.from_pretrained(model)
    text = make_documents(40, seed=1)[0]
    expected = [*words(text).input_ids, words.eos_token_id]
    assert corpus.read(0, len(expected)).tolist() == expected and expected[0] == words.bos_token_id
    assert corpus.tokens == corpus.manifest.counts["tokens"] and corpus.manifest.tokenizer == tokenizer.fingerprint
    assert "perplexity" in run("evaluate", "in", "--data", "shards/train", "--tokens", 64, "--device", "cpu")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    asked = ["../in/config.toml", "data.train=../shards/train", f"run.dir={tmp_path}/run", *ARGUMENTS]
    assert run_ranks(train_main, 1, asked, grouped=False) == [0]
    name = "model.layers.0.mlp.up_proj.weight"
    first = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).state_dict()[name]
    now = read_tensor(tmp_path / "run/checkpoints/step-00000002", f"weight/{name}")
    assert 0 < (now - first).abs().max() < 3e-3, "two steps of 1e-3 from the imported weights"
    export_model(str(tmp_path / "run/checkpoints/step-00000002"), tmp_path / "out")
    assert tokenizer_files(tmp_path / "out") == tokenizer_files(model)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (model, tmp_path / "out"))
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert after[key] == before[key]


def train_main(rank: int, world_size: int, arguments: list[str]) -> int:
    return main(arguments)


def test_export_writes_the_files_that_came(model: Path, imported: Path, tmp_path: Path) -> None:
    export_model(str(imported), tmp_path / "out")
    assert tokenizer_files(tmp_path / "out") == tokenizer_files(model) and len(tokenizer_files(model)) > len(MORE)
    export_model(str(imported), tmp_path / "named", tokenizer=str(imported / "tokenizer"))
    assert tokenizer_files(tmp_path / "named") == tokenizer_files(model)
    assert "without a tokenizer" in export_model(str(imported), tmp_path / "none", tokenizer="none")


def test_a_tokenizer_that_cannot_be_read_is_kept_and_said(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "stock"
    shutil.copytree(model, folder)
    (folder / "tokenizer.json").rename(folder / "tekken.json")
    said = import_model(folder, tmp_path / "in")
    assert (
        said[1].startswith("the files of its tokenizer are kept (tokenizer/original), but tiglon cannot use it: ")
        and "Tekken" in said[1]
    )
    assert load_config(str(tmp_path / "in" / "config.toml"), []).data.tokenizer == ""
    export_model(str(tmp_path / "in"), tmp_path / "out")
    assert tokenizer_files(tmp_path / "out") == tokenizer_files(folder)
    with pytest.raises(ValueError, match="is a Tekken tokenizer"):
        open_kept(str(tmp_path / "in"))


def test_a_model_of_mistral_keeps_the_name_of_its_file(tmp_path: Path) -> None:
    mistral_common = pytest.importorskip("mistral_common")
    file = Path(mistral_common.__file__).parent / "data" / "mistral_instruct_tokenizer_240323.model.v3"
    shutil.copy(file, tmp_path / "tokenizer.model.v3")
    files, remark = kept_tokenizer(tmp_path, {"eos_token_id": 2}, 32768)
    assert not remark
    assert sorted(files) == [
        f"tokenizer/{name}" for name in ("original/tokenizer.model.v3", "tiglon_tokenizer.json", "tokenizer.model")
    ]
    assert files["tokenizer/original/tokenizer.model.v3"] == files["tokenizer/tokenizer.model"] == file.read_bytes()


def test_the_files_that_0_1_0_kept_are_read_and_exported(model: Path, imported: Path, tmp_path: Path) -> None:
    """It kept them as they were, without a directory of their own."""
    old = tmp_path / "old"
    shutil.copytree(imported, old)
    shutil.rmtree(old / "tokenizer")
    shutil.copytree(imported / "tokenizer" / "original", old / "tokenizer")
    ours, theirs = open_kept(str(old)), open_kept(str(imported))
    assert ours is not None and theirs is not None and ours.fingerprint == theirs.fingerprint
    export_model(str(old), tmp_path / "out")
    assert tokenizer_files(tmp_path / "out") == tokenizer_files(model)
    assert open_kept(str(tmp_path)) is None
