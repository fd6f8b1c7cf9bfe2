"""Checkpoints across layouts, without engines."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.ranks import run_ranks
from tests.trainer.layouts import KINDS, emptied, shards, truth
from trainer.checkpoint import Checkpoints, Meta, load, names, read_meta, read_tensor, verify
from trainer.config import CheckpointConfig

META = Meta(step=100, tokens=12345, config={"run": {"seed": 1}}, fingerprints={"corpus": "ab"}, world={"world_size": 4})
LAYOUTS = [(1, 1, True), (2, 1, True), (1, 3, True), (2, 2, True), (2, 2, False), (1, 2, False)]


def _save(rank: int, world_size: int, folder: str, tensor: int, partitioned: bool, asynchronous: bool) -> None:
    group = torch.distributed.group.WORLD
    kept = Checkpoints(folder, CheckpointConfig(asynchronous=asynchronous), rank, world_size, group, lambda text: None)
    data = world_size // tensor
    kept.save(shards(truth(), (rank % tensor, tensor), (rank // tensor, data), partitioned), META)
    kept.close()


def _assert_loads(path: str, tensor: int, data: int, partitioned: bool) -> None:
    full = truth()
    for rank in range(tensor * data):
        want = shards(full, (rank % tensor, tensor), (rank // tensor, data), partitioned)
        got = emptied(shards(full, (rank % tensor, tensor), (rank // tensor, data), partitioned))
        assert load(path, got) == META
        for a, b in zip(want, got):
            assert torch.equal(a.values, b.values), (a.name, tensor, data, rank)


@pytest.mark.parametrize("tensor, data, partitioned", LAYOUTS)
def test_any_layout_loads_what_any_layout_wrote(tmp_path: Path, tensor: int, data: int, partitioned: bool) -> None:
    run_ranks(_save, tensor * data, str(tmp_path), tensor, partitioned, False)
    path = str(tmp_path / "step-00000100")
    for reader in LAYOUTS:
        _assert_loads(path, *reader)
    full = truth()
    assert names(path) == {name: (tuple(value.shape), torch.float32) for name, value in full.items()}
    for name, value in full.items():
        assert torch.equal(read_tensor(path, name), value)
    verify(path)


def _alone(folder: Path, meta: Meta = META, dtype: torch.dtype = torch.float32, **settings: object) -> str:
    kept = Checkpoints(str(folder), CheckpointConfig.model_validate(settings), 0, 1, None, lambda text: None)
    kept.save(shards(truth(dtype=dtype), (0, 1), (0, 1), True), meta)
    kept.close()
    return str(folder / f"step-{meta.step:08d}")


@pytest.mark.gpu
def test_values_on_a_gpu_are_held_as_they_were_when_asked(tmp_path: Path) -> None:
    held = shards(truth(), (0, 1), (0, 1), True)
    for shard in held:
        shard.values = shard.values.cuda()
    kept = Checkpoints(str(tmp_path), CheckpointConfig(), 0, 1, None, lambda text: None)
    kept.save(held, META)
    emptied(held)  # training goes on at once
    kept.close()
    load(tmp_path / "step-00000100", held)
    assert all(torch.equal(shard.values.cpu(), truth()[shard.name].reshape(-1)) for shard in held)


def test_numbers_convert_between_formats(tmp_path: Path) -> None:
    path = _alone(tmp_path)
    got = emptied(shards(truth(dtype=torch.bfloat16), (0, 1), (0, 1), True))
    load(path, got)
    assert all(torch.equal(shard.values, truth()[shard.name].reshape(-1).bfloat16()) for shard in got)
    path = _alone(tmp_path / "low", dtype=torch.bfloat16)
    got = emptied(shards(truth(), (1, 2), (0, 1), True))
    load(path, got)
    want = shards(truth(dtype=torch.bfloat16), (1, 2), (0, 1), True)
    assert all(torch.equal(a.values, b.values.float()) for a, b in zip(got, want))


def test_only_some_names_are_filled(tmp_path: Path) -> None:
    path = _alone(tmp_path)
    got = emptied(shards(truth(), (0, 1), (0, 1), True))
    load(path, got, only=lambda name: name.startswith("weight/"))
    for shard in got:
        want = truth()[shard.name].reshape(-1) if shard.name.startswith("weight/") else torch.full_like(shard.values, -7)
        assert torch.equal(shard.values, want)


def test_the_files_are_plain_safetensors_and_json(tmp_path: Path) -> None:
    path = _alone(tmp_path)
    with safe_open(f"{path}/rank-00000.safetensors", framework="pt") as file:
        key = "weight/model.embed_tokens.weight[0:34,0:12]"
        assert torch.equal(file.get_tensor(key), truth()["weight/model.embed_tokens.weight"])
    tree = json.loads((Path(path) / "manifest.json").read_text())
    assert (tree["step"], tree["tokens"], tree["config"]) == (100, 12345, {"run": {"seed": 1}})
    assert sorted(file.name for file in Path(path).iterdir()) == ["manifest.json", "rank-00000.safetensors"]
    assert read_meta(path) == META


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    kept = Checkpoints(str(tmp_path), CheckpointConfig(), 0, 1, None, lambda text: None)
    kept.save(shards(truth(kinds=KINDS[:2]), (0, 1), (0, 1), True), META)
    kept.close()
    path = str(tmp_path / "step-00000100")
    with pytest.raises(ValueError, match=r"no second_moment/.*reset_optimizer"):
        load(path, shards(truth(), (0, 1), (0, 1), True))
    wrong = shards(truth(kinds=KINDS[:1]), (0, 1), (0, 1), True)
    wrong[0].shape = wrong[0].slice_shape = (17, 24)
    with pytest.raises(ValueError, match=r"shape \(34, 12\), this run wants \(17, 24\)"):
        load(path, wrong)
    with pytest.raises(ValueError, match="no tensor weight/x"):
        read_tensor(path, "weight/x")
    with pytest.raises(FileNotFoundError, match="is not a checkpoint"):
        read_meta(tmp_path)
