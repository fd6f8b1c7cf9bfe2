"""A save: every rank's file, the manifest, and what can go wrong."""

import re
import resource
from pathlib import Path

import pytest
import torch

from data.storage import open_store
from launch.checkpoints import load_checkpoint
from tests.ranks import run_ranks
from tests.trainer.layouts import saved, shards, truth
from trainer.checkpoint import writer
from trainer.checkpoint.api import Checkpoints
from trainer.checkpoint.manifest import CheckpointMeta
from trainer.config import CheckpointConfig


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    checkpoints, _ = saved(tmp_path, 10)
    checkpoints.save(shards(truth(99), (0, 1), (0, 1), True), CheckpointMeta(10, 1))
    checkpoints.close()
    assert [path.name for path in sorted(tmp_path.iterdir())] == [".lock", "step-00000010"]
    got = shards(truth(), (0, 1), (0, 1), True)
    load_checkpoint(tmp_path / "step-00000010", got)
    assert torch.equal(got[0].values, truth(99)[got[0].name].reshape(-1))


def _full_disk(rank: int, world_size: int, folder: str, asynchronous: bool) -> tuple[list[str], list[str], str]:
    """Step 10 fits; then rank 1 may write no more than 3000 bytes into a file; then it may again; then never more."""
    writer.RETRY_SECONDS = 0.01
    reports: list[str] = []
    config = CheckpointConfig(asynchronous=asynchronous, max_failures=2)
    checkpoints = Checkpoints(open_store, folder, config, torch.distributed.group.WORLD, reports.append)
    ended = ""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    for step in (10, 20, 30, 40, 50):
        full = rank == 1 and step in (20, 40, 50)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000 if full else most, most))
        try:
            checkpoints.save(shards(truth(step), (0, 1), (rank, world_size), True), CheckpointMeta(step, step))
            checkpoints.wait()
        except OSError as error:
            ended = str(error)
            break
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    checkpoints._failures = 0
    newest = checkpoints.newest()
    checkpoints.close()
    return reports, [str(newest)], ended


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk_never_kills_a_healthy_run_before_its_time(tmp_path: Path, asynchronous: bool) -> None:
    first, second = run_ranks(_full_disk, 2, str(tmp_path), asynchronous)
    reports, newest, ended = first
    assert [re.sub(r" after .*", "", text) for text in reports] == [
        "checkpoint of step 10 complete",
        "checkpoint of step 20 failed (1 of 2): rank 1: File too large",
        "checkpoint of step 30 complete",
        "checkpoint of step 40 failed (1 of 2): rank 1: File too large",
        "checkpoint of step 50 failed (2 of 2): rank 1: File too large",
    ]
    assert ended == second[2] and "2 checkpoints in a row could not be written" in ended
    assert newest == second[1] == [str(tmp_path / "step-00000030")]
    assert [path.name for path in sorted(tmp_path.iterdir())] == [".lock", "step-00000010", "step-00000030"]


def _own_disks(rank: int, world_size: int, folder: str) -> list[str]:
    """Each rank has a directory of its own, as nodes without a shared one do."""
    writer.RETRY_SECONDS = 0.01
    reports: list[str] = []
    group = torch.distributed.group.WORLD
    checkpoints = Checkpoints(open_store, f"{folder}/node{rank}", CheckpointConfig(), group, reports.append)
    checkpoints.save(shards(truth(), (0, 1), (rank, world_size), True), CheckpointMeta(10, 10))
    checkpoints.close()
    return reports


def test_directories_that_are_not_shared_are_noticed(tmp_path: Path) -> None:
    reports = run_ranks(_own_disks, 2, str(tmp_path))[0]
    assert reports == [
        "checkpoint of step 10 failed (1 of 3): rank-00001.safetensors is missing as rank 0 sees it: "
        f"all ranks must share {tmp_path}/node0"
    ]
    assert list(tmp_path.glob("*/step-*")) == []
