"""tiglon checkpoint list, verify, show, diff."""

import json
import os
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from data.storage import open_store
from launch.commands.checkpoint import checkpoint_app
from tests.trainer.layouts import shards, truth
from trainer.checkpoint.api import Checkpoints
from trainer.checkpoint.manifest import CheckpointMeta
from trainer.config import CheckpointConfig

COUNT = len(truth())


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(checkpoint_app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


@pytest.fixture
def a_run(tmp_path: Path) -> Path:
    """A run directory with checkpoints of steps 10 and 20, which differ in one element of one tensor."""
    kept = Checkpoints(open_store, tmp_path / "checkpoints", CheckpointConfig(), None, lambda text: None)
    for step in (10, 20):
        full = truth()
        full["momentum/model.norm.weight"][3] += 0.25 * (step == 20)
        config = {"train": {"steps": step}, "run": {"seed": 0}}
        kept.save(
            shards(full, (0, 1), (0, 1), True),
            CheckpointMeta(step, step * 100, config, {"corpus": "a"}, world={"engine": "zero"}),
        )
    kept.close()
    return tmp_path


def test_list_names_every_checkpoint_and_what_is_wrong(a_run: Path) -> None:
    status, text = run("list", a_run)
    assert status == 0 and "1,000" in text and "2,000" in text and "engine zero" in text and text.count("complete") == 2
    (a_run / "checkpoints" / "step-00000010" / "rank-00000.safetensors").unlink()
    os.truncate(a_run / "checkpoints" / "step-00000020" / "manifest.json", 50)
    rows = json.loads(run("list", a_run, "--json")[1])
    assert rows[0]["state"] == "1 file missing" and "manifest.json is damaged" in rows[1]["state"]
    assert [row["step"] for row in rows] == [10, 20]


def test_verify_reads_every_byte(a_run: Path) -> None:
    status, text = run("verify", a_run)
    assert status == 0 and text.count("intact") == 2
    path = a_run / "checkpoints" / "step-00000020" / "rank-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    status, text = run("verify", a_run)
    assert status == 1 and text.count("intact") == 1 and "rank-00000.safetensors is damaged" in text
    assert run("verify", a_run / "checkpoints" / "step-00000010")[0] == 0


def test_show_tells_where_it_comes_from_and_what_it_holds(a_run: Path) -> None:
    status, text = run("show", a_run)
    assert status == 0 and "step: 20" in text and "corpus a" in text and "weight/model.norm.weight" in text
    shown = json.loads(run("show", a_run, "--json", "--numbers")[1])
    assert len(shown["tensors"]) == COUNT and shown["config"]["train"]["steps"] == 20
    row = next(row for row in shown["tensors"] if row["tensor"] == "weight/model.embed_tokens.weight")
    value = truth()["weight/model.embed_tokens.weight"].double()
    assert row["shape"] == [34, 12] and row["dtype"] == "F32" and row["not finite"] == 0
    assert row["rms"] == pytest.approx(float(value.square().mean().sqrt())) and row["least"] == float(value.min())


def test_diff_finds_one_element(a_run: Path) -> None:
    folder = a_run / "checkpoints"
    status, text = run("diff", folder / "step-00000010", folder / "step-00000020")
    assert status == 1
    assert "step: 10 -> 20\ntokens: 1,000 -> 2,000\n" in text and "train.steps: 10 -> 20" in text and "run.seed" not in text
    assert f"{COUNT - 1} of {COUNT} tensors are equal bit for bit" in text
    assert "momentum/model.norm.weight: 1 of 12 elements, at most 0.25" in text
    status, text = run("diff", a_run, folder / "step-00000020")
    assert status == 0 and text == f"{COUNT} of {COUNT} tensors are equal bit for bit\n"


def test_diff_of_other_shapes_names_and_formats(a_run: Path, tmp_path: Path) -> None:
    full = truth(kinds=("weight",), dtype=torch.bfloat16)
    kept = Checkpoints(open_store, str(tmp_path / "other"), CheckpointConfig(), None, lambda text: None)
    kept.save(shards(full, (0, 1), (0, 1), True), CheckpointMeta(1, 1))
    kept.close()
    tensors = json.loads(run("diff", a_run, tmp_path / "other", "--json")[1])["tensors"]
    found = {row["tensor"]: row["difference"] for row in tensors}
    assert found["momentum/model.norm.weight"] == "only in the first"
    assert found["weight/model.norm.weight"].startswith("float32 -> bfloat16, 1")


def test_a_place_without_checkpoints_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is neither a checkpoint nor a run that has one"):
        run("list", tmp_path)
