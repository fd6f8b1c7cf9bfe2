"""What an asynchronous save holds while training goes on beside its copy."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.trainer.layouts import emptied, shards, truth
from trainer import staging
from trainer.checkpoint import Checkpoints, Meta, load
from trainer.config import CheckpointConfig
from trainer.rectangles import Box
from trainer.staging import Staging
from trainer.tensorfile import Piece

SLOW_SECONDS = 0.5
copy_at_once = Staging._copy


def _copy_late(kept: Staging, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    time.sleep(SLOW_SECONDS)
    copy_at_once(kept, pairs)


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
    used = kept._staging
    assert used._reserving is not None
    used._reserving.join()
    place = used._buffer.data_ptr()
    assert used._buffer.numel() == sum(shard.values.nbytes for shard in held)
    kept.save(held, Meta(1, 1))
    kept.close()
    assert used._buffer.data_ptr() == place
    never = Checkpoints(str(tmp_path), CheckpointConfig(every_steps=0), 0, 1, None, lambda text: None)
    never.reserve(held)
    assert never._staging._reserving is None
    never.close()


def test_without_room_for_the_copy_the_save_fails_and_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(kept: Staging, found: list) -> list:
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


def test_pinned_memory_is_as_large_as_the_state_and_no_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own would be the next power of two."""
    calls: list[tuple[str, int]] = []
    monkeypatch.setattr(staging, "pin_memory", lambda place, size: calls.append(("pin", size)))
    monkeypatch.setattr(staging, "unpin_memory", lambda place: calls.append(("unpin", place)))
    kept = Staging()
    kept._gpu = torch.device("cuda")
    kept._room([_piece(5_000_000)])
    kept._room([_piece(5_000_000)])
    place = kept._buffer.data_ptr()
    kept._room([_piece(7_000_000)])
    assert calls == [("pin", 5_000_000), ("unpin", place), ("pin", 7_000_000)]


def test_memory_that_cannot_be_pinned_is_used_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(place: int, size: int) -> None:
        raise RuntimeError("Registering memory failed with cudaError: 2.")

    monkeypatch.setattr(staging, "pin_memory", refused)
    kept = Staging()
    kept._gpu = torch.device("cuda")
    kept._room([_piece(4096)])
    assert kept._buffer.numel() == 4096 and not kept._pinned
    assert "cannot be pinned" in caplog.text
    kept._release()


def _piece(size: int) -> Piece:
    return Piece("x", (size,), Box((0,), (size,)), torch.empty(size, dtype=torch.uint8))


@pytest.mark.gpu
def test_a_gpu_copies_into_memory_that_is_pinned_and_exact() -> None:
    held = [replace(_piece(3 << 20), values=torch.arange(3 << 20, device="cuda").to(torch.uint8))]
    kept = Staging()
    kept.reserve(held)
    kept.begin(held)
    copied = kept.copy(held)
    assert kept._pinned and copied[0].values.is_pinned() and kept._buffer.numel() == 3 << 20
    assert torch.equal(copied[0].values, held[0].values.cpu())
