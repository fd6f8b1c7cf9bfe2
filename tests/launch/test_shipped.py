"""The shipped configurations: what their headers say, that they fit where those say, and that they train and resume."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tiglon
from data.ingest.prepare import PrepareOptions, prepare
from data.tokenizer.huggingface import tokenizer_files
from data.tokenizer.tokenizer import Tokenizer
from launch.checkpoints import verify_checkpoint
from launch.commands.import_model import import_model
from launch.load_config import load_config
from launch.planner.layouts import make_plan
from launch.shipped import is_shipped, lesson, plan_command_of, shipped_names, shipped_text
from model.sizes import parameter_counts
from tests.launch.test_train import run
from trainer.monitoring.records import read_records

ROOT = Path(__file__).parent.parent.parent


CONTINUED = {"continue-llama": "imported", "llama-8b-32k": "llama-8b", "llama-8b-128k": "llama-8b-32k"}
"""Recipes that begin at the weights of something else."""


def places(corpus: Path, run_directory: Path) -> list[str]:
    shards = {"train": "shards/train", "validation": "shards/validation", "tokenizer": "tokenizer"}
    return [*(f"data.{key}={corpus}/{value}" for key, value in shards.items()), f"run.dir={run_directory}", "run.device=cpu"]


def test_an_unknown_name_is_answered_with_the_nearest_and_all():
    assert shipped_names() == sorted(shipped_names()) and {"quickstart", "gpt-124m"} < {*shipped_names()}
    with pytest.raises(FileNotFoundError, match=r"^no .* the name gpt124m; did you mean gpt-124m\? There are continue-llama, "):
        shipped_text("gpt124m")
    with pytest.raises(FileNotFoundError, match=r"the name zzz; there are continue-llama, .*, tiger-untied$"):
        shipped_text("zzz")


def test_a_file_of_ones_own_comes_first_but_not_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("muon").mkdir()
    assert is_shipped("muon") and load_config("muon").optimizer.name == "muon"
    Path("lion").write_text("[train]\nsteps = 7\n")
    assert not is_shipped("lion") and load_config("lion").train.steps == 7


def test_the_first_sentence_of_a_header():
    text = "# Llama 3.2 (Su 2023, kexue.fm/archives/9708)\n# in one line. More.\n#\n#     tiglon plan x --gpus 1\n\n[run]\n"
    assert lesson(text) == "Llama 3.2 (Su 2023, kexue.fm/archives/9708) in one line."
    assert plan_command_of(text) == "tiglon plan x --gpus 1"


@pytest.mark.parametrize("name", shipped_names())
def test_it_fits_where_its_header_plans_it(name: str):
    words = plan_command_of(shipped_text(name)).split()
    assert words[:4] == ["tiglon", "plan", name, "--gpus"] and words[5] == "--gpu" and len(words) == 7
    plan = make_plan(load_config(name), int(words[4]), words[6])
    assert plan.problem == "" and plan.configured is not None and plan.configured.fits


@pytest.mark.parametrize(
    "name", [name for name in shipped_names() if not name.startswith("quickstart") and name not in CONTINUED]
)
def test_it_trains_on_twenty_tokens_per_parameter(name: str):
    """Without the head, which variants of gpt-124m may have of their own: they read the same tokens. Active ones count."""
    config = load_config(name)
    counts = parameter_counts(config.model)
    parameters = counts["active"] - counts["head"]
    assert 20 <= config.train.steps * config.train.batch_tokens / parameters <= 23


VARIANTS = {
    "mla": {"model"}, "rerope": {"position", "evaluate"}, "long-context": {"position", "evaluate"}, "lion": {"optimizer"},
    "tiger-untied": {"model", "optimizer"}, "muon": {"optimizer"},
}  # fmt: skip
"""Recipe -> the sections in which it differs from gpt-124m, besides run.dir."""


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_can_be_compared(name: str):
    base, variant = (load_config(each, ["run.dir=same"]).model_dump() for each in ("gpt-124m", name))
    assert {section for section in base if base[section] != variant[section]} == VARIANTS[name]
    assert name in shipped_text("gpt-124m").partition("\n\n")[0] and "as in gpt-124m" in shipped_text(name)


@pytest.mark.parametrize(
    "overrides",
    [
        ["parallel.tensor_parallel_size=2", "run.deterministic=true"],
        ["parallel.tensor_parallel_size=2", "parallel.sequence_parallel=true", "train.recompute=selective"],
        ["parallel.zero_stage=3", "train.recompute=selective", "run.deterministic=true"],
    ],
    ids=" ".join,
)
def test_quickstart_on_two_ranks(corpus: Path, tmp_path: Path, overrides: list[str]):
    """Its vocabulary of 4,096 is larger than the 330 pieces here, and it samples at the end: both once ended runs."""
    options = [*places(corpus, tmp_path / "run"), "train.steps=2", "evaluate.tokens=2048", *overrides]
    screen = run("quickstart", *options, ranks=2, screen=str(tmp_path / "screen"))
    assert "failed" not in screen
    records = read_records(tmp_path / "run/metrics.jsonl")
    assert [record["tokens"] for record in records if record["kind"] == "evaluate"] == [2048]
    assert [record["step"] for record in records if record["kind"] == "text"] == [2]
    verify_checkpoint(tmp_path / "run/checkpoints/step-00000002")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_llama_8b_made_small(corpus: Path, tmp_path: Path):
    """Every option of the file, compiled blocks included; only sizes and places are other."""
    config = load_config("llama-8b")
    sizes = {
        "model.vocab_size": 512, "model.hidden_size": 128, "model.intermediate_size": 256, "model.num_hidden_layers": 2,
        "train.steps": 3, "train.sequence_length": 64, "train.global_batch_size": 4, "checkpoint.every_steps": 2,
        "evaluate.tokens": 1024,
    }  # fmt: skip
    options = [*places(corpus, tmp_path / "run"), *(f"{key}={value}" for key, value in sizes.items())]
    assert config.parallel.engine == "zero" and config.train.compile
    muon = ("optimizer.name=muon", "optimizer.qk_clip=100")
    several = {
        "zero": (),
        "fold": ("parallel.engine=fold",),  # the file says how to choose it
        "muon-tensor-2": (*muon, "parallel.tensor_parallel_size=2"),
        "muon-zero-3": (*muon, "parallel.zero_stage=3"),
        "muon-fold": (*muon, "parallel.engine=fold", "optimizer.muon.nesterov=false", "optimizer.muon.others=tiger"),
    }
    for name, more in several.items():
        directory = f"run.dir={tmp_path}/{name}"
        run("llama-8b", *options, *more, directory, ranks=2, screen=str(tmp_path / f"screen-{name}"))
        verify_checkpoint(tmp_path / name / "checkpoints/step-00000003")
    losses = {
        name: [r["loss"] for r in read_records(tmp_path / name / "metrics.jsonl") if r["kind"] == "train"] for name in several
    }
    assert losses["muon-tensor-2"] == pytest.approx(losses["muon-zero-3"], rel=1e-3) and losses["muon-zero-3"] != losses["zero"]


SMALL = {
    "model.vocab_size": 330, "model.hidden_size": 64, "model.intermediate_size": 128, "model.num_hidden_layers": 2,
    "model.num_attention_heads": 4, "train.steps": 3, "train.sequence_length": 64, "train.global_batch_size": 4,
    "train.micro_batch_size": 1, "checkpoint.every_steps": 2, "checkpoint.keep_every_steps": 0, "evaluate.tokens": 1024,
    "log.every_steps": 1, "run.device": "cpu",
}  # fmt: skip
PIPELINED = [
    "model.num_key_value_heads=2", "model.num_hidden_layers=4", "parallel.tensor_parallel_size=1",
    "parallel.sequence_parallel=false", "parallel.pipeline_parallel_size=2", "parallel.pipeline_stages_per_rank=2",
]  # fmt: skip
SHARED = [
    "model.num_key_value_heads=2", "position.window=16", "evaluate.contexts=[128]", "parallel.tensor_parallel_size=1",
    "parallel.sequence_parallel=false", "parallel.context_parallel_size=2",
]  # fmt: skip
MADE_DATA = ["data.tokenizer=tokenizer", "data.train=corpus/train", "data.validation=corpus/validation"]
EXPERTS = [
    "model.kv_lora_rank=32", "model.qk_nope_head_dim=16", "model.qk_rope_head_dim=8", "model.v_head_dim=16",
    "model.n_routed_experts=8", "model.moe_intermediate_size=32",
]  # fmt: skip
FURTHER = {
    "mla": ["model.kv_lora_rank=32", "model.qk_nope_head_dim=16", "model.qk_rope_head_dim=8", "model.v_head_dim=16"],
    "rerope": ["evaluate.contexts=[128]", "evaluate.position.window=32"],
    "long-context": ["evaluate.contexts=[128]", "position.window=16"],
    "llama-1b": ["model.num_key_value_heads=2"],
    "llama-8b": ["model.num_key_value_heads=2"],
    "llama-8b-32k": [*SHARED, "checkpoint.resume=runs/llama-8b/checkpoints/step-00000003"],
    "llama-8b-128k": [*SHARED, "checkpoint.resume=runs/llama-8b-32k/checkpoints/step-00000003"],
    "llama-70b": PIPELINED,
    "continue-llama": ["model.num_key_value_heads=2"],
    "moe-100m-active": EXPERTS,
    "deepseek-v2-lite": [*EXPERTS, "parallel.expert_parallel_size=2"],
    "quickstart": MADE_DATA,
    "quickstart-moe": [*MADE_DATA, *EXPERTS],
}  # fmt: skip
"""Sizes of what only one recipe has, and places of those that make their own data."""


def made_small(name: str) -> list[str]:
    return [*(f"{key}={value}" for key, value in SMALL.items()), *FURTHER.get(name, [])]


def import_small_llama(corpus: Path) -> None:
    """As the header of continue-llama says, in the working directory: a model with a tokenizer, and text prepared with it."""
    keys = {key.removeprefix("model."): value for key, value in SMALL.items() if key.startswith("model.")}
    position = load_config("continue-llama").position
    scaling = {
        "rope_type": "llama3", "rope_theta": position.rope_theta, "factor": position.factor, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": position.trained_length,
    }  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(**keys, num_key_value_heads=2, rope_parameters=scaling, tie_word_embeddings=True, rms_norm_eps=1e-5)
    ).save_pretrained("Llama")
    for file, content in tokenizer_files(Tokenizer.load(str(corpus / "tokenizer")), 64).items():
        (Path("Llama") / file).write_bytes(content)
    import_model(Path("Llama"), Path("imported"))
    prepare([str(corpus / "*.txt")], "imported/tokenizer", "corpus", PrepareOptions(validation_fraction=0.1))


def begins_at(name: str) -> list[str]:
    """The recipes whose weights one is handed, the first of them first."""
    other = CONTINUED.get(name)
    return [*begins_at(other), other] if other in shipped_names() else []


@pytest.mark.slow
@pytest.mark.parametrize("name", shipped_names())
def test_it_trains_made_small_and_resumes(name: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """From its own paths in another working directory; on two ranks, and resumed on one."""
    monkeypatch.chdir(tmp_path)
    if name == "continue-llama":
        import_small_llama(corpus)
    else:
        Path("tokenizer").symlink_to(corpus / "tokenizer")
        Path("corpus").symlink_to(corpus / "shards")
    for other in begins_at(name):
        run(other, *made_small(other), "train.compile=false", ranks=2, screen="screen")
    eager = [*made_small(name), "train.compile=false"]
    screen = run(name, *eager, ranks=2, screen="screen")
    assert ("weights from" in screen) == (name in CONTINUED), screen
    alone = [f"parallel.{axis}_parallel_size=1" for axis in ("context", "pipeline", "expert")]
    assert tiglon.train(name, [*eager, "train.steps=4", *alone]).step == 4
    records = read_records(tmp_path / "runs" / name / "metrics.jsonl")
    assert [record["step"] for record in records if record["kind"] == "train"] == [1, 2, 3, 4]
    assert all(math.isfinite(record["loss"]) for record in records if "loss" in record)


@pytest.mark.slow
def test_the_command_trains_it_outside_the_checkout(corpus: Path, tmp_path: Path):
    (tmp_path / "tokenizer").symlink_to(corpus / "tokenizer")
    (tmp_path / "corpus").symlink_to(corpus / "shards")
    command = [sys.executable, "-m", "launch", "train", "gpt-124m", "--nproc", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for steps in (3, 4):
        overrides = [*made_small("gpt-124m"), "train.compile=false", f"train.steps={steps}"]
        asked = [*command, *overrides]
        done = subprocess.run(asked, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=140)
        assert done.returncode == 0, done.stderr
    assert "resumed from runs/gpt-124m/checkpoints/step-00000003" in done.stderr
    verify_checkpoint(tmp_path / "runs/gpt-124m/checkpoints/step-00000004")
