"""Defaults and automatic choices, made once and written into RUN/config.toml."""

import tomllib
from pathlib import Path

import pytest
import torch

from launch.load_config import build_config, load_config
from launch.resolve import config_toml, resolve, resolved
from model.parallel.mesh import Mesh
from tests.launch.test_train import run


def test_config_toml_holds_what_was_asked_for_and_what_acted(configuration: str, tmp_path: Path):
    screen = run(configuration, "train.steps=4", "train.recompute=auto", "optimizer.adamw.learning_rate=2e-3")
    found = tomllib.loads((tmp_path / "run/config.toml").read_text())
    acted = found.pop("resolved")
    assert found["optimizer"] == {"name": "adamw", "adamw": {"learning_rate": 2e-3}} and found["train"]["recompute"] == "auto"
    assert "health" not in found
    assert acted["train"]["recompute"] == "none" and acted["optimizer"]["adamw"]["betas"] == [0.9, 0.95]
    assert acted["model"]["head_dim"] == 8 and acted["position"]["trained_length"] == 32
    assert acted["world"] == {
        "ranks": 1, "context_parallel_size": 1, "data_parallel_size": 1, "pipeline_parallel_size": 1,
        "expert_parallel_size": 1,
        "micro_batches_per_update": 4,
    }  # fmt: skip
    assert acted["optimizer"]["max_grad_norm"] == 1.0 and acted["health"]["grace_seconds"] == 30.0
    again = load_config(tmp_path / "run/config.toml")
    assert again == load_config(configuration, ["train.steps=4", "train.recompute=auto", "optimizer.adamw.learning_rate=2e-3"])
    assert "as in" not in screen


def test_automatic_choices_are_made_and_everything_else_is_kept(monkeypatch: pytest.MonkeyPatch):
    asked = build_config({}, ["train.recompute=auto", "run.device=auto", "train.compile=true"])
    acting = resolve(asked, 1, torch.device("cpu"))
    assert (acting.train.recompute, acting.run.device, acting.optimizer.compile) == ("none", "cpu", True)
    update = {"train": asked.train, "run": asked.run, "optimizer": asked.optimizer, "parallel": asked.parallel}
    assert acting.model_copy(update=update) == asked
    monkeypatch.setattr("launch.runtime.memory_capacity_bytes", lambda *_: 1.0)
    assert resolve(asked, 1, torch.device("cpu")).train.recompute == "full", "where nothing fits"


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [
        (["schedule.kind=cosine"], 90),
        (["schedule.kind=cosine", "schedule.warmup_steps=160"], 0),  # the run ends while it warms up
        (["schedule.kind=warmup-stable-decay"], 20),
        (["schedule.kind=linear", "schedule.decay_steps=7"], 7),
    ],
)
def test_resolved_values_are_those_that_act(schedule: list[str], wanted: int):
    found = resolved(build_config({}, ["train.steps=100", "schedule.warmup_steps=10", *schedule]), Mesh())
    assert found["schedule"]["decay_steps"] == wanted
    assert found["evaluate"]["position"]["trained_length"] == found["train"]["sequence_length"]
    assert found["checkpoint"]["directory"] == f"{found['run']['dir']}/checkpoints"
    assert (
        found["world"]["micro_batches_per_update"] * found["train"]["micro_batch_size"] == found["train"]["global_batch_size"]
    )


def test_the_first_part_of_config_toml_is_what_was_asked_for(tmp_path: Path):
    asked = build_config({"train": {"steps": 7}, "run": {"dir": "a b"}})
    (tmp_path / "config.toml").write_text(config_toml(asked, resolve(asked, 1, torch.device("cpu")), Mesh()))
    found = tomllib.loads((tmp_path / "config.toml").read_text())
    found.pop("resolved")
    assert found == {"train": {"steps": 7}, "run": {"dir": "a b"}} and load_config(tmp_path / "config.toml") == asked
