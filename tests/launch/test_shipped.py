"""The shipped configurations, as they are, with the overrides that people try first."""

from pathlib import Path

import pytest

from launch.checkpoints import verify_checkpoint
from launch.config import load_config
from tests.launch.test_train import run
from trainer.monitoring.records import read_records

CONFIGS = Path(__file__).parent.parent.parent / "launch" / "configs"


def places(corpus: Path, run_directory: Path) -> list[str]:
    shards = {"train": "shards/train", "validation": "shards/validation", "tokenizer": "tokenizer"}
    return [*(f"data.{key}={corpus}/{value}" for key, value in shards.items()), f"run.dir={run_directory}", "run.device=cpu"]


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
    screen = run(str(CONFIGS / "quickstart.toml"), *options, ranks=2, screen=str(tmp_path / "screen"))
    assert "failed" not in screen
    records = read_records(tmp_path / "run/metrics.jsonl")
    assert [record["tokens"] for record in records if record["kind"] == "evaluate"] == [2048]
    assert [record["step"] for record in records if record["kind"] == "text"] == [2]
    verify_checkpoint(tmp_path / "run/checkpoints/step-00000002")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_llama_8b_made_small(corpus: Path, tmp_path: Path):
    """Every option of the file, compiled blocks included; only sizes and places are other."""
    config = load_config(CONFIGS / "llama-8b.toml")
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
        run(str(CONFIGS / "llama-8b.toml"), *options, *more, directory, ranks=2, screen=str(tmp_path / f"screen-{name}"))
        verify_checkpoint(tmp_path / name / "checkpoints/step-00000003")
    losses = {
        name: [r["loss"] for r in read_records(tmp_path / name / "metrics.jsonl") if r["kind"] == "train"] for name in several
    }
    assert losses["muon-tensor-2"] == pytest.approx(losses["muon-zero-3"], rel=1e-3) and losses["muon-zero-3"] != losses["zero"]
