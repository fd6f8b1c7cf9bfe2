"""Two runs and one directory: on a disk, and in an object store over a real S3 protocol."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data.storage import join_address, open_store
from launch.checkpoints import verify_checkpoint
from tests.trainer.layouts import saved, shards, truth
from trainer.checkpoint import lock
from trainer.checkpoint.api import Checkpoints
from trainer.checkpoint.manifest import CheckpointMeta
from trainer.config import CheckpointConfig

RENEW_SECONDS, SILENT_SECONDS = 1.2, 5.0
"""The store's own times are whole seconds."""

OWNER = """
import sys
from data.storage import open_store
from trainer.checkpoint import lock
from trainer.checkpoint.api import Checkpoints
from trainer.config import CheckpointConfig
lock.RENEW_SECONDS = {renew}
Checkpoints(open_store, {folder!r}, CheckpointConfig(directory={address!r}), None, print)
print("taken", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(lock, "RENEW_SECONDS", RENEW_SECONDS)
    monkeypatch.setattr(lock, "SILENT_SECONDS", SILENT_SECONDS)
    from tests.object_store import served_bucket  # which skips a test where the server is not installed

    with served_bucket() as address:
        yield address


def _run(folder: Path, address: str, reports: list[str]) -> Checkpoints:
    return Checkpoints(open_store, str(folder), CheckpointConfig(directory=address, asynchronous=False), None, reports.append)


def _killed(folder: Path, address: str) -> None:
    """A run takes the directory and is killed."""
    program = OWNER.format(renew=RENEW_SECONDS, folder=str(folder), address=address)
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"taken\n"
        other.kill()


def test_a_second_run_is_refused_and_the_first_continues(bucket: str, tmp_path: Path) -> None:
    reports: list[str] = []
    first = _run(tmp_path / "first", bucket, reports)
    first.save(shards(truth(), (0, 1), (0, 1), True), CheckpointMeta(10, 10))
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"belongs to a run that is still going \(process \d+ on .*another checkpoint.directory"
        ):
            _run(tmp_path / "second", bucket, [])
    first.save(shards(truth(), (0, 1), (0, 1), True), CheckpointMeta(20, 20))
    first.close()
    assert [text.partition(" after")[0] for text in reports] == [f"checkpoint of step {step} complete" for step in (10, 20)]
    for step in ("step-00000010", "step-00000020"):
        verify_checkpoint(join_address(bucket, step))
    began = time.monotonic()
    _run(tmp_path / "second", bucket, reports).close()  # what was given back is free at once
    assert time.monotonic() - began < RENEW_SECONDS and len(reports) == 2


def test_a_killed_run_comes_back_at_once_in_its_own_directory(bucket: str, tmp_path: Path) -> None:
    _killed(tmp_path / "run", bucket)
    reports: list[str] = []
    _run(tmp_path / "run", bucket, reports).close()
    assert reports == []
    assert open_store(bucket).entries(".lock") == []


def test_a_killed_run_comes_back_from_elsewhere_after_a_silence(bucket: str, tmp_path: Path) -> None:
    _killed(tmp_path / "run", bucket)
    reports: list[str] = []
    checkpoints = _run(tmp_path / "other", bucket, reports)
    assert len(reports) == 1 and "waiting up to 5 s to see whether that run is alive" in reports[0]
    checkpoints.close()


def test_a_run_that_lost_its_directory_writes_nothing_more(bucket: str, tmp_path: Path) -> None:
    reports: list[str] = []
    late = _run(tmp_path / "late", bucket, reports)
    store = open_store(bucket)
    store.remove(f".lock/{store.entries('.lock')[0]}")  # as another run does after a silence
    now = _run(tmp_path / "now", bucket, reports)
    now.save(shards(truth(1), (0, 1), (0, 1), True), CheckpointMeta(10, 10))
    late.save(shards(truth(2), (0, 1), (0, 1), True), CheckpointMeta(10, 10))
    assert "failed (1 of 3)" in reports[-1] and "was taken by another run" in reports[-1]
    verify_checkpoint(join_address(bucket, "step-00000010"))
    assert store.entries("step-00000010") == ["manifest.json", "rank-00000.safetensors"]
    time.sleep(1.5 * RENEW_SECONDS)
    assert len(store.entries(".lock")) == 1  # the late one does not take it back
    late.close()
    now.close()


def test_a_store_that_cannot_be_written_is_refused_at_once(bucket: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"checkpoint.directory s3://.*@missing/a.* cannot be written"):
        _run(tmp_path / "run", re.sub("@[^/]*", "@missing", bucket), [])


def test_a_start_that_is_refused_leaves_no_lock_behind(tmp_path: Path) -> None:
    refused, _ = saved(tmp_path / "run" / "checkpoints")
    refused.close()
    assert list(tmp_path.iterdir()) == []
    saved(tmp_path / "run" / "checkpoints", 10)[0].close()
    owner = (tmp_path / "run/checkpoints/.lock").read_text()
    (tmp_path / "run/checkpoints/.lock").write_text("somebody before")
    refused, _ = saved(tmp_path / "run" / "checkpoints")
    assert (tmp_path / "run/checkpoints/.lock").read_text() == owner, "while it has the directory it says so"
    refused.close()
    assert (tmp_path / "run/checkpoints/.lock").read_text() == "somebody before"


def test_two_runs_cannot_share_a_directory_of_checkpoints_either(tmp_path: Path) -> None:
    settings = CheckpointConfig(directory=str(tmp_path / "shared"))
    first = Checkpoints(open_store, str(tmp_path / "one"), settings, None, print)
    with pytest.raises(ValueError, match=r"shared belongs to a run that is still going .*another checkpoint.directory"):
        Checkpoints(open_store, str(tmp_path / "two"), settings, None, print)
    assert not (tmp_path / "two").exists()
    first.close()


def test_two_runs_cannot_share_a_directory(tmp_path: Path) -> None:
    checkpoints, _ = saved(tmp_path)
    with pytest.raises(ValueError, match=rf"belongs to a run that is still going \(process {os.getpid()} on .*another run.dir"):
        saved(tmp_path)
    checkpoints.close()
    saved(tmp_path)[0].close()


def test_a_killed_run_gives_its_directory_back(tmp_path: Path) -> None:
    locks = f"from trainer.checkpoint.lock import FileLock; FileLock(pathlib.Path({str(tmp_path)!r})).acquire()"
    program = f"import pathlib; {locks}; print('locked', flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with other:
        assert other.stdout is not None and other.stdout.readline() == b"locked\n"
        with pytest.raises(ValueError, match=rf"process {other.pid} on"):
            saved(tmp_path)
        other.send_signal(signal.SIGKILL)
        other.wait()
    saved(tmp_path)[0].close()


def test_a_directory_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        saved(tmp_path / "file" / "checkpoints")
    if os.geteuid() != 0:
        (tmp_path / "closed").mkdir(mode=0o555)
        with pytest.raises(ValueError, match="cannot be written"):
            saved(tmp_path / "closed")
