"""Two runs and one object-store directory, over a real S3 protocol."""

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.object_store import served_bucket
from tests.trainer.layouts import shards, truth
from trainer import lease
from trainer.checkpoint import Checkpoints, Meta, verify
from trainer.config import CheckpointConfig
from trainer.store import join, open_store

RENEW_SECONDS, SILENT_SECONDS = 1.2, 5.0
"""The store's own times are whole seconds."""

OWNER = """
import sys
from trainer import lease
from trainer.checkpoint import Checkpoints
from trainer.config import CheckpointConfig
lease.RENEW_SECONDS = {renew}
Checkpoints({folder!r}, CheckpointConfig(directory={address!r}), 0, 1, None, print)
print("taken", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(lease, "RENEW_SECONDS", RENEW_SECONDS)
    monkeypatch.setattr(lease, "SILENT_SECONDS", SILENT_SECONDS)
    with served_bucket() as address:
        yield address


def _run(folder: Path, address: str, said: list[str]) -> Checkpoints:
    return Checkpoints(str(folder), CheckpointConfig(directory=address, asynchronous=False), 0, 1, None, said.append)


def _killed(folder: Path, address: str) -> None:
    """A run takes the directory and is killed."""
    program = OWNER.format(renew=RENEW_SECONDS, folder=str(folder), address=address)
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"taken\n"
        other.kill()


def test_a_second_run_is_refused_and_the_first_goes_on(bucket: str, tmp_path: Path) -> None:
    said: list[str] = []
    first = _run(tmp_path / "first", bucket, said)
    first.save(shards(truth(), (0, 1), (0, 1), True), Meta(10, 10))
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"belongs to a run that is still going \(process \d+ on .*another checkpoint.directory"
        ):
            _run(tmp_path / "second", bucket, [])
    first.save(shards(truth(), (0, 1), (0, 1), True), Meta(20, 20))
    first.close()
    assert [text.partition(" after")[0] for text in said] == [f"checkpoint of step {step} complete" for step in (10, 20)]
    for step in ("step-00000010", "step-00000020"):
        verify(join(bucket, step))
    began = time.monotonic()
    _run(tmp_path / "second", bucket, said).close()  # what was given back is free at once
    assert time.monotonic() - began < RENEW_SECONDS and len(said) == 2


def test_a_killed_run_comes_back_at_once_in_its_own_directory(bucket: str, tmp_path: Path) -> None:
    _killed(tmp_path / "run", bucket)
    said: list[str] = []
    _run(tmp_path / "run", bucket, said).close()
    assert said == []
    assert open_store(bucket).entries(".lock") == []


def test_a_killed_run_comes_back_from_elsewhere_after_a_silence(bucket: str, tmp_path: Path) -> None:
    _killed(tmp_path / "run", bucket)
    said: list[str] = []
    kept = _run(tmp_path / "other", bucket, said)
    assert len(said) == 1 and "waiting up to 5 s for a sign of life" in said[0]
    kept.close()


def test_a_run_that_lost_its_directory_writes_nothing_more(bucket: str, tmp_path: Path) -> None:
    said: list[str] = []
    late = _run(tmp_path / "late", bucket, said)
    store = open_store(bucket)
    store.remove(f".lock/{store.entries('.lock')[0]}")  # as another run does after a silence
    now = _run(tmp_path / "now", bucket, said)
    now.save(shards(truth(1), (0, 1), (0, 1), True), Meta(10, 10))
    late.save(shards(truth(2), (0, 1), (0, 1), True), Meta(10, 10))
    assert "failed (1 of 3)" in said[-1] and "was taken by another run" in said[-1]
    verify(join(bucket, "step-00000010"))
    assert store.entries("step-00000010") == ["manifest.json", "rank-00000.safetensors"]
    time.sleep(1.5 * RENEW_SECONDS)
    assert len(store.entries(".lock")) == 1  # the late one does not take it back
    late.close()
    now.close()


def test_a_store_that_cannot_be_written_is_refused_at_once(bucket: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"checkpoint.directory s3://.*@missing/a.* cannot be written"):
        _run(tmp_path / "run", re.sub("@[^/]*", "@missing", bucket), [])
