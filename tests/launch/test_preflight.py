"""What can be known before a run is refused before it: status 2, one sentence, nothing written."""

import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from launch.checkpoints import read_tensor, tensor_names
from launch.commands.configured import load_begun
from launch.load_config import load_config
from launch.planner.memory import checkpoint_bytes
from launch.preflight import check_disk, checkpoints_at_once
from launch.train import main
from tests.launch.conftest import save_checkpoint
from tests.launch.test_train import run
from trainer.config import CheckpointConfig
from trainer.monitoring.progress import format_bytes

Usage = namedtuple("Usage", "total used free")
TIGER = ["optimizer.name=tiger"]


def refused(configuration: str, tmp_path: Path, capsys: pytest.CaptureFixture, *overrides: str) -> str:
    before = sorted(tmp_path.rglob("*"))
    assert main([configuration, *overrides]) == 2
    screen = capsys.readouterr().err
    assert screen.startswith("tiglon: ") and screen.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
    return screen


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (
            ["log.tracker=wandb"],
            "log.tracker = 'wandb' needs the wandb package, which is not installed; run pip install 'tiglon[wandb]'",
        ),
        (["log.tracker=wand"], "log.tracker = 'wand'"),
        (["log.sample_prompt=def ", "data.tokenizer="], "log.sample_prompt needs data.tokenizer"),
        (["log.sample_prompt=def ", "data.tokenizer=/nowhere"], "/nowhere"),
        (["parallel.zero_stage=3", "parallel.zero_hpz_partition_size=2"], "does not divide 1 data-parallel rank;"),
        (["checkpoint.resume=/nowhere"], "/nowhere is neither a checkpoint nor a run that has one"),
        (["run.dir=FILE/run"], "run.dir = 'FILE/run' cannot be a directory: FILE is a file"),
        (["checkpoint.directory=FILE"], "checkpoint.directory = 'FILE' cannot be a directory: FILE is a file"),
        (["checkpoint.directory=s3://"], "s3:// names no bucket"),
        (["train.cuda_graphs=true", "train.compile=true", "train.precision=bf16"], "needs a GPU"),
    ],
)
def test_refused(configuration: str, tmp_path: Path, capsys, monkeypatch, overrides: list[str], wanted: str):
    monkeypatch.setitem(sys.modules, "wandb", None)
    file = tmp_path / "file"
    file.touch()
    screen = refused(configuration, tmp_path, capsys, *(text.replace("FILE", str(file)) for text in overrides))
    assert wanted.replace("FILE", str(file)) in screen


@pytest.mark.parametrize("change", [["optimizer.name=adamw"], [*TIGER, "optimizer.rules.embedding.rule=adamw"]])
def test_a_checkpoint_without_the_states_of_the_optimizer(configuration: str, tmp_path: Path, capsys, change: list[str]):
    run(configuration, "train.steps=2", *TIGER, f"run.dir={tmp_path}/run")
    written = (tmp_path / "run" / "config.toml").read_bytes()
    said = refused(configuration, tmp_path, capsys, f"run.dir={tmp_path}/run", *change)
    assert "has no second_moment/model." in said and "(it holds momentum, weight); start a new run from its weights" in said
    assert (tmp_path / "run" / "config.toml").read_bytes() == written


def test_under_torchrun_refusals_come_before_it(configuration: str, tmp_path: Path):
    overrides = ["log.sample_prompt=def ", "data.tokenizer="]
    asked = [sys.executable, "-m", "launch", "train", configuration, "--nproc", "2", *overrides]
    ended = subprocess.run(asked, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1
    assert ended.stderr.startswith("tiglon: log.sample_prompt needs")


def test_a_checkpoint_of_another_model_is_refused_before_the_run_directory_is_touched(configuration, tmp_path, capsys):
    run(configuration, "train.steps=2", f"run.dir={tmp_path}/other")
    source = f"checkpoint.resume={tmp_path}/other/checkpoints/step-00000002"
    assert "is of another model" in refused(configuration, tmp_path, capsys, source, "model.hidden_size=64")
    assert "would change the order of the data" in refused(configuration, tmp_path, capsys, source, "run.seed=7")


@pytest.mark.parametrize(
    ("trained", "asked"),
    [
        (["train.sequence_length=96"], ["parallel.context_parallel_size=3"]),
        (
            ["model.num_attention_heads=6", "model.num_key_value_heads=6", "model.head_dim=8", "train.sequence_length=96"],
            ["parallel.context_parallel_size=3", "parallel.context_exchange=heads"],
        ),
        (
            ["model.num_attention_heads=6", "model.num_key_value_heads=3", "model.head_dim=8", "model.intermediate_size=96"],
            ["parallel.tensor_parallel_size=3"],
        ),
        (["model.sliding_window=8"], ["evaluate.position={kind='rope',windowed_rope_theta=50}"]),
    ],
)
def test_what_a_checkpoint_says_is_checked_and_not_the_defaults(
    configuration: str, corpus: Path, tmp_path: Path, trained: list[str], asked: list[str]
):
    """Of a file that leaves training keys unset: refused as a run of its own, taken as one that resumes."""
    before = load_config(configuration, trained)
    bare = tmp_path / "bare.toml"
    bare.write_text(f'[data]\ntrain = "{corpus}/shards/train"\n')
    with pytest.raises(ValueError, match=r"is not divisible|does not divide|has no layer to act in"):
        load_begun(bare, [f"run.dir={tmp_path}/other", *asked])
    save_checkpoint(before, 4)
    settled = load_begun(bare, [f"run.dir={before.run.dir}", *asked]).config
    assert settled.model == before.model and settled.train.sequence_length == before.train.sequence_length
    with pytest.raises(ValueError, match=r"is not divisible by parallel.tensor_parallel_size = 7"):
        load_begun(bare, [f"run.dir={before.run.dir}", *asked, "parallel.tensor_parallel_size=7"])


def test_no_room_for_the_checkpoints(configuration: str, tmp_path: Path, capsys, monkeypatch):
    """Twelve steps, one checkpoint in four, two kept: three at a time."""
    config = load_config(configuration)
    wanted = 3 * checkpoint_bytes(config)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(0, 0, wanted))
    check_disk(config)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(0, 0, wanted - 1))
    said = refused(configuration, tmp_path, capsys)
    assert f"will hold 3 more checkpoints of {format_bytes(wanted / 3)} each" in said and f"but {tmp_path} has" in said


def test_bytes_of_a_checkpoint_are_those_of_its_tensors(configuration: str, tmp_path: Path):
    for name, options in {
        "adamw": [],
        "tiger": ["optimizer.name=tiger", "optimizer.rules.embedding.rule=adamw"],
        "fold": ["optimizer.name=tiger", "parallel.engine=fold", "train.precision=bf16"],
    }.items():
        run(configuration, "train.steps=1", f"run.dir={tmp_path}/{name}", *options)
        last = tmp_path / name / "checkpoints/step-00000001"
        tensors = [read_tensor(last, tensor) for tensor in tensor_names(last)]
        assert checkpoint_bytes(load_config(configuration, options)) == sum(x.numel() * x.element_size() for x in tensors)


@pytest.mark.parametrize(
    ("settings", "last", "done", "wanted"),
    [
        ({"every_steps": 4, "keep": 2}, 12, 0, 3),
        ({"every_steps": 4, "keep": 2}, 4, 0, 1),
        ({"every_steps": 0, "keep": 2}, 12, 0, 1),
        ({"every_steps": 4, "keep": 2}, 13, 12, 2),
        ({"every_steps": 1, "keep": 1, "keep_every_steps": 5}, 20, 0, 2 + 3),
    ],
)
def test_checkpoints_at_once(settings: dict, last: int, done: int, wanted: int):
    """Counted by hand; the last row keeps 5, 10 and 15 beside the newest two."""
    assert checkpoints_at_once(CheckpointConfig(**settings), last, done) == wanted


def test_a_disk_that_is_too_small(configuration: str, tmp_path: Path, capsys):
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tiglon", str(place)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("no right to mount a file system")
    try:
        assert "make room" in refused(configuration, tmp_path, capsys, f"run.dir={place}/run")
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)
