"""What checkpoints ask of a file layer, asked of a disk and of a real S3 protocol on loopback."""

from collections.abc import Iterator

import pytest
import torch

from data.storage import join_address, open_store
from launch.checkpoints import load_checkpoint, read_meta, verify_checkpoint
from tests.object_store import served_bucket
from tests.trainer.layouts import emptied, shards, truth
from trainer.checkpoint.api import Checkpoints
from trainer.checkpoint.manifest import CheckpointMeta
from trainer.config import CheckpointConfig


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with served_bucket() as address:
        yield address


def test_a_run_saves_prunes_and_resumes_in_an_object_store(bucket: str, tmp_path: object) -> None:
    reports: list[str] = []
    checkpoints = Checkpoints(
        open_store, f"{tmp_path}/checkpoints", CheckpointConfig(directory=bucket, keep=2), None, reports.append
    )
    for step in (10, 20, 30):
        checkpoints.save(shards(truth(step), (0, 1), (0, 1), True), CheckpointMeta(step, step))
    checkpoints.wait()
    store = open_store(bucket)
    assert store.entries() == [".lock", "step-00000020", "step-00000030"]
    newest = str(checkpoints.newest())
    assert newest == join_address(bucket, "step-00000030")
    assert read_meta(newest).step == 30
    for rank in range(2):
        got = emptied(shards(truth(), (rank, 2), (0, 1), True))
        load_checkpoint(newest, got)
        want = shards(truth(30), (rank, 2), (0, 1), True)
        assert all(torch.equal(a.values, b.values) for a, b in zip(got, want))
    _damage(bucket, checkpoints, reports)


def _damage(bucket: str, checkpoints: Checkpoints, reports: list[str]) -> None:
    store = open_store(bucket)
    store.write("step-00000030/rank-00000.safetensors", b"short")
    with pytest.raises(ValueError, match="has 5 bytes"):
        verify_checkpoint(join_address(bucket, "step-00000030"))
    assert checkpoints.newest() == join_address(bucket, "step-00000020")
    assert "step-00000030" in reports[-1] and "has 5 bytes" in reports[-1]
    store.write("step-00000040/rank-00000.safetensors", b"half written, no manifest")
    assert checkpoints.newest() == join_address(bucket, "step-00000020")
    checkpoints.save(shards(truth(25), (0, 1), (0, 1), True), CheckpointMeta(25, 25))
    checkpoints.close()
    assert checkpoints.newest() == join_address(bucket, "step-00000025")
    store.recover("step-")
    assert "step-00000040" not in store.entries()
