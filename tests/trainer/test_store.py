"""Checkpoints in an object store: a real S3 protocol on loopback."""

from collections.abc import Iterator

import pytest
import torch

from tests.object_store import served_bucket
from tests.trainer.layouts import emptied, shards, truth
from trainer.checkpoint import Checkpoints, Meta, load, read_meta, verify
from trainer.config import CheckpointConfig
from trainer.store import is_remote, join, open_store, write


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with served_bucket() as address:
        yield address


def test_a_run_saves_prunes_and_resumes_in_an_object_store(bucket: str, tmp_path: object) -> None:
    said: list[str] = []
    kept = Checkpoints(f"{tmp_path}/checkpoints", CheckpointConfig(directory=bucket, keep=2), 0, 1, None, said.append)
    for step in (10, 20, 30):
        kept.save(shards(truth(step), (0, 1), (0, 1), True), Meta(step, step))
    kept.wait()
    store = open_store(bucket)
    assert store.entries() == [".lock", "step-00000020", "step-00000030"]
    newest = kept.newest()
    assert newest == join(bucket, "step-00000030")
    assert read_meta(newest).step == 30
    for rank in range(2):
        got = emptied(shards(truth(), (rank, 2), (0, 1), True))
        load(newest, got)
        want = shards(truth(30), (rank, 2), (0, 1), True)
        assert all(torch.equal(a.values, b.values) for a, b in zip(got, want))
    _damage(bucket, kept, said)


def _damage(bucket: str, kept: Checkpoints, said: list[str]) -> None:
    store = open_store(bucket)
    write(store, "step-00000030/rank-00000.safetensors", b"short")
    with pytest.raises(ValueError, match="has 5 bytes"):
        verify(join(bucket, "step-00000030"))
    assert kept.newest() == join(bucket, "step-00000020")
    assert "step-00000030" in said[-1] and "has 5 bytes" in said[-1]
    write(store, "step-00000040/rank-00000.safetensors", b"half written, no manifest")
    assert kept.newest() == join(bucket, "step-00000020")
    kept.save(shards(truth(25), (0, 1), (0, 1), True), Meta(25, 25))
    kept.close()
    assert kept.newest() == join(bucket, "step-00000025")
    store.recover()
    assert "step-00000040" not in store.entries()


def test_addresses() -> None:
    assert join("s3://b/a/?x=1", "step") == "s3://b/a/step?x=1"
    assert join("/a/b", "c") == "/a/b/c"
    assert not is_remote("file:///a") and not is_remote("/a") and is_remote("gs://a/b")
    with pytest.raises(ValueError, match="checkpoint address nothing://x cannot be opened"):
        open_store("nothing://x")
