"""What an asynchronous save holds while training continues beside its copy."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data.storage import open_store
from launch.checkpoints import load_checkpoint
from tests.trainer.layouts import emptied, shards, truth
from trainer.checkpoint import staging
from trainer.checkpoint.api import Checkpoints
from trainer.checkpoint.format import StagedTensor
from trainer.checkpoint.manifest import CheckpointMeta
from trainer.checkpoint.rectangles import Rectangle
from trainer.checkpoint.staging import Staging
from trainer.config import CheckpointConfig

SLOW_SECONDS = 0.5
copy_at_once = Staging._copy


def _copy_late(kept: Staging, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    time.sleep(SLOW_SECONDS)
    copy_at_once(kept, pairs)


def test_what_only_the_update_changes_is_copied_behind_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Staging, "_copy", _copy_late)
    held = shards(truth(), (0, 1), (0, 1), True)
    for shard in held:
        shard.changes_in = "update" if shard.name.startswith("weight/") else "accumulate"
    kept = Checkpoints(open_store, str(tmp_path), CheckpointConfig(), None, lambda text: None)
    assert not kept.wait_for_copy("update")
    kept.save(held, CheckpointMeta(1, 1))
    assert kept.wait_for_copy("accumulate")  # nothing was there yet
    for shard in held:
        if shard.changes_in == "accumulate":
            shard.values.fill_(-7)
    assert kept.wait_for_copy("update")  # the weights were not there yet
    emptied(held)
    kept.close()
    load_checkpoint(tmp_path / "step-00000001", held)
    assert all(torch.equal(shard.values, truth()[shard.name].reshape(-1)) for shard in held)


def test_memory_reserved_beforehand_is_what_a_save_copies_into(tmp_path: Path) -> None:
    held = shards(truth(), (0, 1), (0, 1), True)
    kept = Checkpoints(open_store, str(tmp_path), CheckpointConfig(), None, lambda text: None)
    kept.reserve(held)
    used = kept._staging
    assert used._reserving is not None
    used._reserving.join()
    address = used._buffer.data_ptr()
    assert used._buffer.numel() == sum(shard.values.nbytes for shard in held)
    kept.save(held, CheckpointMeta(1, 1))
    kept.close()
    assert used._buffer.data_ptr() == address
    never = Checkpoints(open_store, str(tmp_path), CheckpointConfig(every_steps=0), None, lambda text: None)
    never.reserve(held)
    assert never._staging._reserving is None
    never.close()


def test_nothing_is_reserved_any_more_once_checkpoints_are_closed(tmp_path: Path) -> None:
    """A run with nothing left to do ends at once, and Python must not end while a thread is inside torch: that aborts it."""
    kept = Checkpoints(open_store, str(tmp_path), CheckpointConfig(), None, lambda text: None)
    kept._staging.reserve([_tensor(4 << 30)])
    kept.close()
    used = kept._staging
    assert used._reserving is not None and not used._reserving.is_alive()


def test_a_save_without_memory_for_its_copy_fails_and_training_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(kept: Staging, found: list) -> list:
        raise OSError(12, "Cannot allocate memory")

    said: list[str] = []
    kept = Checkpoints(open_store, str(tmp_path), CheckpointConfig(), None, said.append)
    with monkeypatch.context() as patch:
        patch.setattr(Staging, "_targets", no_memory)
        kept.save(shards(truth(), (0, 1), (0, 1), True), CheckpointMeta(1, 1))
        kept.wait_for_copy("update")
        kept.wait()
    assert said == [
        "checkpoint of step 1 failed (1 of 3): rank 0: the state could not be copied to host memory "
        "([Errno 12] Cannot allocate memory)"
    ]
    kept.save(shards(truth(), (0, 1), (0, 1), True), CheckpointMeta(2, 2))
    kept.close()
    assert [path.name for path in sorted(tmp_path.iterdir())] == [".lock", "step-00000002"]


def test_pinned_memory_is_as_large_as_the_state_and_no_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own would be the next power of two."""
    calls: list[tuple[str, int]] = []
    monkeypatch.setattr(staging, "pin", lambda buffer, gpu: calls.append(("pin", buffer.numel())) is None)
    monkeypatch.setattr(staging, "unpin", lambda buffer: calls.append(("unpin", buffer.data_ptr())))
    kept = Staging()
    kept._gpu = torch.device("cuda")
    kept._allocate([_tensor(5_000_000)])
    kept._allocate([_tensor(5_000_000)])
    address = kept._buffer.data_ptr()
    kept._allocate([_tensor(7_000_000)])
    assert calls == [("pin", 5_000_000), ("unpin", address), ("pin", 7_000_000)]


def _tensor(size: int) -> StagedTensor:
    return StagedTensor("x", (size,), Rectangle((0,), (size,)), torch.empty(size, dtype=torch.uint8))


@pytest.mark.gpu
def test_a_gpu_copies_into_memory_that_is_pinned_and_exact() -> None:
    held = [replace(_tensor(3 << 20), values=torch.arange(3 << 20, device="cuda").to(torch.uint8))]
    kept = Staging()
    kept.reserve(held)
    kept.begin(held)
    copied = kept.copy(held)
    assert kept._pinned and copied[0].values.is_pinned() and kept._buffer.numel() == 3 << 20
    assert torch.equal(copied[0].values, held[0].values.cpu())
