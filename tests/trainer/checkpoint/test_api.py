"""Checkpoints across layouts, without engines."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from data.storage import DiskStore, open_store
from launch.checkpoints import load_checkpoint, read_meta, read_tensor, tensor_names, verify_checkpoint
from tests.ranks import run_ranks
from tests.trainer.layouts import emptied, saved, shards, steps_in, truth
from trainer.checkpoint import writer
from trainer.checkpoint.api import Checkpoints
from trainer.checkpoint.manifest import CheckpointMeta
from trainer.config import CheckpointConfig

META = CheckpointMeta(
    step=100, tokens=12345, config={"run": {"seed": 1}}, fingerprints={"corpus": "ab"}, world={"world_size": 4}
)
LAYOUTS = [(1, 1, True), (2, 1, True), (1, 3, True), (2, 2, True), (2, 2, False), (1, 2, False)]


def _save(rank: int, world_size: int, folder: str, tensor: int, partitioned: bool, asynchronous: bool) -> None:
    group = torch.distributed.group.WORLD
    checkpoints = Checkpoints(open_store, folder, CheckpointConfig(asynchronous=asynchronous), group, lambda text: None)
    data = world_size // tensor
    checkpoints.save(shards(truth(), (rank % tensor, tensor), (rank // tensor, data), partitioned), META)
    checkpoints.close()


def _assert_loads(path: str, tensor: int, data: int, partitioned: bool) -> None:
    full = truth()
    for rank in range(tensor * data):
        want = shards(full, (rank % tensor, tensor), (rank // tensor, data), partitioned)
        got = emptied(shards(full, (rank % tensor, tensor), (rank // tensor, data), partitioned))
        assert load_checkpoint(path, got) == META
        for a, b in zip(want, got):
            assert torch.equal(a.values, b.values), (a.name, tensor, data, rank)


@pytest.mark.parametrize("tensor, data, partitioned", LAYOUTS)
def test_any_layout_loads_what_any_layout_wrote(tmp_path: Path, tensor: int, data: int, partitioned: bool) -> None:
    run_ranks(_save, tensor * data, str(tmp_path), tensor, partitioned, False)
    path = str(tmp_path / "step-00000100")
    for reader in LAYOUTS:
        _assert_loads(path, *reader)
    full = truth()
    assert tensor_names(path) == {name: (tuple(value.shape), torch.float32) for name, value in full.items()}
    for name, value in full.items():
        assert torch.equal(read_tensor(path, name), value)
    verify_checkpoint(path)


def _alone(folder: Path, meta: CheckpointMeta = META, dtype: torch.dtype = torch.float32, **settings: object) -> str:
    checkpoints = Checkpoints(open_store, str(folder), CheckpointConfig.model_validate(settings), None, lambda text: None)
    checkpoints.save(shards(truth(dtype=dtype), (0, 1), (0, 1), True), meta)
    checkpoints.close()
    return str(folder / f"step-{meta.step:08d}")


@pytest.mark.gpu
def test_values_on_a_gpu_are_held_as_they_were_when_asked(tmp_path: Path) -> None:
    held = shards(truth(), (0, 1), (0, 1), True)
    for shard in held:
        shard.values = shard.values.cuda()
    checkpoints = Checkpoints(open_store, str(tmp_path), CheckpointConfig(), None, lambda text: None)
    checkpoints.save(held, META)
    emptied(held)  # training continues at once
    checkpoints.close()
    load_checkpoint(tmp_path / "step-00000100", held)
    assert all(torch.equal(shard.values.cpu(), truth()[shard.name].reshape(-1)) for shard in held)


def test_the_files_are_plain_safetensors_and_json(tmp_path: Path) -> None:
    path = _alone(tmp_path)
    with safe_open(f"{path}/rank-00000.safetensors", framework="pt") as file:
        key = "weight/model.embed_tokens.weight[0:34,0:12]"
        assert torch.equal(file.get_tensor(key), truth()["weight/model.embed_tokens.weight"])
    tree = json.loads((Path(path) / "manifest.json").read_text())
    assert (tree["step"], tree["tokens"], tree["config"]) == (100, 12345, {"run": {"seed": 1}})
    assert sorted(file.name for file in Path(path).iterdir()) == ["manifest.json", "rank-00000.safetensors"]
    assert read_meta(path) == META


def test_the_last_save_is_tried_until_it_is_complete_or_reported_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "RETRY_SECONDS", 0.01)
    checkpoints, reports = saved(tmp_path, 10, max_failures=1)

    class Tries(list):
        def append(self, text: str) -> None:
            super().append(text)
            if "failed" in text and len(self) > 1:
                checkpoints._directory.store = DiskStore(str(tmp_path))

    broken = DiskStore("/proc/nowhere")
    checkpoints._directory.store, checkpoints._report = broken, (tries := Tries()).append
    assert checkpoints.save_final(shards(truth(20), (0, 1), (0, 1), True), CheckpointMeta(20, 1)).step == 20
    assert sum("failed" in text for text in tries) == 2 and "complete" in tries[-1]
    checkpoints._directory.store, checkpoints._report = broken, reports.append
    with pytest.raises(OSError, match=r"step 30 is not saved: .*; the newest complete checkpoint is .*step-00000020"):
        checkpoints.save_final(shards(truth(30), (0, 1), (0, 1), True), CheckpointMeta(30, 1))
    checkpoints.close()


def test_an_asynchronous_save_holds_the_moment_it_was_asked(tmp_path: Path) -> None:
    checkpoints, _ = saved(tmp_path)
    held = shards(truth(1), (0, 1), (0, 1), True)
    for step in (1, 2, 3):
        checkpoints.save(held, CheckpointMeta(step, step))
        checkpoints.wait_for_copy("update")
        for shard in held:
            shard.values.add_(1)  # while it is written
    checkpoints.close()
    assert steps_in(tmp_path) == [2, 3]
    got = emptied(shards(truth(1), (0, 1), (0, 1), True))
    load_checkpoint(tmp_path / "step-00000003", got)
    assert all(torch.equal(shard.values, truth(1)[shard.name].reshape(-1) + 1 + 1) for shard in got)


def test_one_failure_may_be_the_last(tmp_path: Path) -> None:
    checkpoints, _ = saved(tmp_path, 10, max_failures=1)
    whole, checkpoints._directory.store = checkpoints._directory.store, DiskStore("/proc/nowhere")
    with pytest.raises(OSError, match=r"^1 checkpoint in a row could not be written"):
        checkpoints.save(shards(truth(20), (0, 1), (0, 1), True), CheckpointMeta(20, 1))
        checkpoints.wait()
    checkpoints._directory.store, checkpoints._failures = whole, 0
    checkpoints.close()


def test_a_directory_without_a_checkpoint_has_no_newest(tmp_path: Path) -> None:
    checkpoints, reports = saved(tmp_path / "new")
    assert checkpoints.newest() is None and reports == []
    (tmp_path / "new" / "step-00000500").mkdir()  # as another program might
    assert checkpoints.newest() is None
    checkpoints.close()


def test_with_nothing_but_damaged_checkpoints_a_run_does_not_begin_anew(tmp_path: Path) -> None:
    checkpoints, reports = saved(tmp_path, 10, 20)
    (tmp_path / "step-00000020" / "manifest.json").write_text("{}")
    assert checkpoints.newest() == str(tmp_path / "step-00000010")
    (tmp_path / "step-00000010" / "rank-00000.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=rf"no checkpoint in {tmp_path} is intact .*checkpoint.resume=never"):
        checkpoints.newest()
    assert len([text for text in reports if "is passed over" in text]) == 3
    checkpoints.close()
