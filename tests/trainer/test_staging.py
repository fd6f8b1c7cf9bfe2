"""What an asynchronous save holds while training goes on beside its copy."""

import time
from pathlib import Path

import pytest
import torch

from tests.trainer.layouts import emptied, shards, truth
from trainer.checkpoint import Checkpoints, Meta, load
from trainer.config import CheckpointConfig
from trainer.staging import Staging

SLOW_SECONDS = 0.5
copy_at_once = Staging._copy


def _copy_late(staging: Staging, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    time.sleep(SLOW_SECONDS)
    copy_at_once(staging, pairs)


def test_what_is_steady_is_copied_behind_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Staging, "_copy", _copy_late)
    held = shards(truth(), (0, 1), (0, 1), True)
    for shard in held:
        shard.steady = shard.name.startswith("weight/")
    kept = Checkpoints(str(tmp_path), CheckpointConfig(), 0, 1, None, lambda text: None)
    assert not kept.wait_for_copy()
    kept.save(held, Meta(1, 1))
    assert kept.wait_for_copy(steady=False)  # nothing was there yet
    for shard in held:
        if not shard.steady:
            shard.values.fill_(-7)
    assert kept.wait_for_copy()  # the weights were not there yet
    emptied(held)
    kept.close()
    load(tmp_path / "step-00000001", held)
    assert all(torch.equal(shard.values, truth()[shard.name].reshape(-1)) for shard in held)


def test_memory_reserved_beforehand_is_what_a_save_copies_into(tmp_path: Path) -> None:
    held = shards(truth(), (0, 1), (0, 1), True)
    kept = Checkpoints(str(tmp_path), CheckpointConfig(), 0, 1, None, lambda text: None)
    kept.reserve(held)
    staging = kept._staging
    assert staging._reserving is not None
    staging._reserving.join()
    place = staging._buffer.data_ptr()
    assert staging._buffer.numel() == sum(shard.values.nbytes for shard in held)
    kept.save(held, Meta(1, 1))
    kept.close()
    assert staging._buffer.data_ptr() == place
    never = Checkpoints(str(tmp_path), CheckpointConfig(every_steps=0), 0, 1, None, lambda text: None)
    never.reserve(held)
    assert never._staging._reserving is None
    never.close()


def test_without_room_for_the_copy_the_save_fails_and_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(staging: Staging, found: list) -> list:
        raise OSError(12, "Cannot allocate memory")

    said: list[str] = []
    kept = Checkpoints(str(tmp_path), CheckpointConfig(), 0, 1, None, said.append)
    with monkeypatch.context() as patch:
        patch.setattr(Staging, "_places", no_room)
        kept.save(shards(truth(), (0, 1), (0, 1), True), Meta(1, 1))
        kept.wait_for_copy()
        kept.wait()
    assert said == [
        "checkpoint of step 1 failed (1 of 3): rank 0: the state could not be copied to host memory "
        "([Errno 12] Cannot allocate memory)"
    ]
    kept.save(shards(truth(), (0, 1), (0, 1), True), Meta(2, 2))
    kept.close()
    assert [path.name for path in sorted(tmp_path.iterdir())] == [".lock", "step-00000002"]
