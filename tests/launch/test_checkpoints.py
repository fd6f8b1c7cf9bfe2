"""Checkpoints by path: a checkpoint, a run, or a directory of checkpoints."""

from pathlib import Path

import pytest
import torch

from launch.checkpoints import (
    checkpoint_directory,
    find_checkpoint,
    load_checkpoint,
    read_checkpoint_manifest,
    read_meta,
    read_tensor,
    tensor_names,
    verify_checkpoint,
)
from tests.trainer.layouts import emptied, saved, shards, truth


def test_a_path_may_be_a_checkpoint_a_run_or_its_directory(tmp_path: Path) -> None:
    saved(tmp_path / "run/checkpoints", 10, 20)[0].close()
    newest = str(tmp_path / "run/checkpoints/step-00000020")
    assert {find_checkpoint(path) for path in (tmp_path / "run", tmp_path / "run/checkpoints", newest)} == {newest}
    older = tmp_path / "run/checkpoints/step-00000010"
    assert find_checkpoint(older) == str(older)
    with pytest.raises(FileNotFoundError, match="is neither a checkpoint nor a run that has one"):
        find_checkpoint(tmp_path)


def test_a_run_says_where_its_checkpoints_are(tmp_path: Path) -> None:
    saved(tmp_path / "elsewhere", 10)[0].close()
    (tmp_path / "run").mkdir()
    config = tmp_path / "run" / "config.toml"
    config.write_text(f'[checkpoint]\ndirectory = "{tmp_path / "elsewhere"}"\n')
    assert find_checkpoint(tmp_path / "run") == str(tmp_path / "elsewhere" / "step-00000010")
    assert checkpoint_directory(str(tmp_path / "elsewhere")) == str(tmp_path / "elsewhere")
    for other in ("", "[checkpoint]\nkeep = 2\n", "no toml", "checkpoint = 3\n", '[resolved.checkpoint]\ndirectory = "x"\n'):
        config.write_text(other)
        assert checkpoint_directory(str(tmp_path / "run")) == str(tmp_path / "run")


def test_every_function_opens_the_path_it_is_given(tmp_path: Path) -> None:
    saved(tmp_path, 10)[0].close()
    path = tmp_path / "step-00000010"
    manifest = read_checkpoint_manifest(path)
    assert read_meta(path) == manifest.meta and (manifest.meta.step, manifest.meta.tokens) == (10, 100)
    full = truth(10)
    assert tensor_names(path) == {name: (tuple(value.shape), value.dtype) for name, value in full.items()}
    for name, value in full.items():
        assert torch.equal(read_tensor(str(path), name), value) and torch.equal(read_tensor(path, name, manifest), value)
    given = emptied(shards(truth(), (0, 1), (0, 1), True))
    assert load_checkpoint(path, given) == manifest.meta
    assert all(torch.equal(shard.values, full[shard.name].reshape(-1)) for shard in given)
    verify_checkpoint(path)
    (path / "rank-00000.safetensors").unlink()
    with pytest.raises(ValueError, match="is missing"):
        verify_checkpoint(path)
