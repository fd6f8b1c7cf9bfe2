"""What can go wrong with a checkpoint, each said in one sentence, nothing lost."""

import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.ranks import run_ranks
from tests.trainer.layouts import emptied, shards, truth
from trainer import checkpoint
from trainer.checkpoint import Checkpoints, Meta, load, verify
from trainer.config import CheckpointConfig
from trainer.life import Life
from trainer.store import Disk


def _saved(folder: Path, *steps: int, **settings: object) -> tuple[Checkpoints, list[str]]:
    said: list[str] = []
    kept = Checkpoints(str(folder), CheckpointConfig.model_validate(settings), 0, 1, None, said.append)
    for step in steps:
        kept.save(shards(truth(step), (0, 1), (0, 1), True), Meta(step, step * 10))
    kept.wait()
    return kept, said


def _steps(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in folder.glob("step-*"))


def _truncate(path: Path) -> None:
    os.truncate(path / "rank-00000.safetensors", 5000)


def _flip(path: Path) -> None:
    content = bytearray((path / "rank-00000.safetensors").read_bytes())
    content[-777] ^= 4
    (path / "rank-00000.safetensors").write_bytes(content)


def _flip_header(path: Path) -> None:
    content = bytearray((path / "rank-00000.safetensors").read_bytes())
    content[20] ^= 1
    (path / "rank-00000.safetensors").write_bytes(content)


def _remove(path: Path) -> None:
    (path / "rank-00000.safetensors").unlink()


def _newer(path: Path) -> None:
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"version": 1', '"version": 99'))


def _shorten_manifest(path: Path) -> None:
    os.truncate(path / "manifest.json", 300)


def _edit_manifest(path: Path) -> None:
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"tokens": 200', '"tokens": 201'))


FAULTS: list[tuple[Callable[[Path], None], str]] = [
    (_truncate, r"rank-00000.safetensors has 5000 bytes, its manifest says \d+"),
    (_flip, r"rank-00000.safetensors is damaged: the checksum of bytes \d+ to \d+ does not match"),
    (_flip_header, r"rank-00000.safetensors is damaged: the checksum of bytes 0 to \d+ does not match"),
    (_remove, r"rank-00000.safetensors is missing"),
    (_newer, r"has format version 99, this tiglon reads up to 1: update tiglon"),
    (_shorten_manifest, r"manifest.json is damaged: it is no whole manifest"),
    (_edit_manifest, r"manifest.json is damaged: its checksum does not match"),
]


@pytest.mark.parametrize("damage, sentence", FAULTS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_damaged_checkpoint_is_passed_over_with_its_reason(
    tmp_path: Path, damage: Callable[[Path], None], sentence: str
) -> None:
    kept, said = _saved(tmp_path, 10, 20)
    damage(tmp_path / "step-00000020")
    with pytest.raises(ValueError, match=sentence):
        verify(tmp_path / "step-00000020")
    assert kept.newest() == str(tmp_path / "step-00000010")
    assert re.search(f"step-00000020 is passed over: .*{sentence}", said[-1])
    got = emptied(shards(truth(), (0, 1), (0, 1), True))
    if damage is not _flip_header:  # names of rectangles, which loading takes from the manifest
        with pytest.raises(ValueError, match=sentence):
            load(tmp_path / "step-00000020", got)
    assert load(tmp_path / "step-00000010", got).tokens == 100
    assert all(torch.equal(shard.values, truth(10)[shard.name].reshape(-1)) for shard in got)
    kept.close()


def test_a_directory_without_a_checkpoint_has_no_newest(tmp_path: Path) -> None:
    kept, said = _saved(tmp_path / "new")
    assert kept.newest() is None and said == []
    (tmp_path / "new" / "step-00000500").mkdir()  # as another program might
    assert kept.newest() is None
    kept.close()


def test_with_nothing_but_damaged_checkpoints_a_run_does_not_begin_anew(tmp_path: Path) -> None:
    kept, said = _saved(tmp_path, 10, 20)
    (tmp_path / "step-00000020" / "manifest.json").write_text("{}")
    assert kept.newest() == str(tmp_path / "step-00000010")
    (tmp_path / "step-00000010" / "rank-00000.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=rf"no checkpoint in {tmp_path} is intact .*checkpoint.resume=never"):
        kept.newest()
    assert len([text for text in said if "is passed over" in text]) == 3
    kept.close()


def test_a_life_leaves_the_checkpoints_of_others_alone(tmp_path: Path) -> None:
    def save(kept: Checkpoints, step: int) -> None:
        kept.save(shards(truth(step), (0, 1), (0, 1), True), Meta(step, step, extra={"life": kept.life.record()}))
        kept.wait()

    first, _ = _saved(tmp_path, keep=9)
    first.life = Life("first")
    for step in (2, 4, 8, 12):
        save(first, step)
    first.close()
    second, _ = _saved(tmp_path, keep=1)
    second.life = Life("second")
    assert second.newest() is None
    save(second, 4)
    assert _steps(tmp_path) == [2, 4], "what is later or has the same name steps aside"
    assert {path.name for path in tmp_path.glob(".step-*")} == {f".step-{n:08d}.superseded" for n in (4, 8, 12)}
    save(second, 6)
    assert _steps(tmp_path) == [2, 6] and second.newest() == str(tmp_path / "step-00000006"), "only its own are pruned"
    second.close()


def test_a_start_that_is_refused_leaves_no_lock_behind(tmp_path: Path) -> None:
    refused, _ = _saved(tmp_path / "run" / "checkpoints")
    refused.close()
    assert list(tmp_path.iterdir()) == []
    _saved(tmp_path / "run" / "checkpoints", 10)[0].close()
    owner = (tmp_path / "run/checkpoints/.lock").read_text()
    (tmp_path / "run/checkpoints/.lock").write_text("somebody before")
    refused, _ = _saved(tmp_path / "run" / "checkpoints")
    assert (tmp_path / "run/checkpoints/.lock").read_text() == owner, "while it has the directory it says so"
    refused.close()
    assert (tmp_path / "run/checkpoints/.lock").read_text() == "somebody before"


def test_two_runs_cannot_share_a_directory_of_checkpoints_either(tmp_path: Path) -> None:
    settings = CheckpointConfig(directory=str(tmp_path / "shared"))
    first = Checkpoints(str(tmp_path / "one"), settings, 0, 1, None, print)
    with pytest.raises(ValueError, match=r"shared belongs to a run that is still going .*another checkpoint.directory"):
        Checkpoints(str(tmp_path / "two"), settings, 0, 1, None, print)
    assert not (tmp_path / "two").exists()
    first.close()


def test_the_last_save_is_tried_until_it_holds_or_said_to_be_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_PAUSE_SECONDS", 0.01)
    kept, said = _saved(tmp_path, 10, max_failures=1)

    class Tries(list):
        def append(self, text: str) -> None:
            super().append(text)
            if "failed" in text and len(self) > 1:
                kept._store = Disk(str(tmp_path))

    broken = Disk("/proc/nowhere")
    kept._store, kept._report = broken, (tries := Tries()).append
    assert kept.secure(shards(truth(20), (0, 1), (0, 1), True), Meta(20, 1)).step == 20
    assert sum("failed" in text for text in tries) == 2 and "complete" in tries[-1]
    kept._store, kept._report = broken, said.append
    with pytest.raises(OSError, match=r"step 30 is not saved: .*; the newest complete checkpoint is .*step-00000020"):
        kept.secure(shards(truth(30), (0, 1), (0, 1), True), Meta(30, 1))
    kept.close()


def test_pruning_keeps_the_newest_and_the_milestones(tmp_path: Path) -> None:
    kept, _ = _saved(tmp_path, *range(10, 80, 10), keep=2, keep_every_steps=30)
    assert _steps(tmp_path) == [30, 60, 70]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".step")] == []
    kept.close()


def test_going_back_sets_the_later_checkpoints_aside(tmp_path: Path) -> None:
    kept, said = _saved(tmp_path, 10, 20, 30, keep=3)
    kept.save(shards(truth(15), (0, 1), (0, 1), True), Meta(15, 150))
    kept.wait()
    assert _steps(tmp_path) == [10, 15]
    assert "checkpoint of step 30 set aside: this run went back to before it" in said
    assert (tmp_path / ".step-00000030.superseded" / "manifest.json").exists()
    kept.close()


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    kept, _ = _saved(tmp_path, 10)
    kept.save(shards(truth(99), (0, 1), (0, 1), True), Meta(10, 1))
    kept.close()
    assert [path.name for path in sorted(tmp_path.iterdir())] == [".lock", "step-00000010"]
    got = shards(truth(), (0, 1), (0, 1), True)
    load(tmp_path / "step-00000010", got)
    assert torch.equal(got[0].values, truth(99)[got[0].name].reshape(-1))


def test_what_a_crash_left_is_cleared_or_brought_back(tmp_path: Path) -> None:
    _saved(tmp_path, 10, 20)[0].close()
    (tmp_path / "step-00000020").rename(tmp_path / ".step-00000020.replaced")  # killed between two renames
    for name in (".step-00000030.partial", ".step-00000005.removed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rank-00000.safetensors").write_bytes(b"half")
    kept, _ = _saved(tmp_path)
    assert (tmp_path / ".step-00000030.partial").exists(), "a start that is refused yet has changed nothing"
    kept.begin()
    assert [path.name for path in sorted(tmp_path.iterdir())] == [".lock", "step-00000010", "step-00000020"]
    assert kept.newest() == str(tmp_path / "step-00000020")
    kept.close()


def test_two_runs_cannot_share_a_directory(tmp_path: Path) -> None:
    kept, _ = _saved(tmp_path)
    with pytest.raises(ValueError, match=rf"belongs to a run that is still going \(process {os.getpid()} on .*another run.dir"):
        _saved(tmp_path)
    kept.close()
    _saved(tmp_path)[0].close()


def test_a_killed_run_gives_its_directory_back(tmp_path: Path) -> None:
    program = f"from trainer.store import Disk; Disk({str(tmp_path)!r}).lock(); print('locked', flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with other:
        assert other.stdout is not None and other.stdout.readline() == b"locked\n"
        with pytest.raises(ValueError, match=rf"process {other.pid} on"):
            _saved(tmp_path)
        other.send_signal(signal.SIGKILL)
        other.wait()
    _saved(tmp_path)[0].close()


def test_a_directory_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        _saved(tmp_path / "file" / "checkpoints")
    if os.geteuid() != 0:
        (tmp_path / "closed").mkdir(mode=0o555)
        with pytest.raises(ValueError, match="cannot be written"):
            _saved(tmp_path / "closed")


def _full_disk(rank: int, world_size: int, folder: str, asynchronous: bool) -> tuple[list[str], list[str], str]:
    """Step 10 fits; then rank 1 may write no more than 3000 bytes into a file; then it may again; then never more."""
    checkpoint._PAUSE_SECONDS = 0.01
    said: list[str] = []
    config = CheckpointConfig(asynchronous=asynchronous, max_failures=2)
    kept = Checkpoints(folder, config, rank, world_size, torch.distributed.group.WORLD, said.append)
    ended = ""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    for step in (10, 20, 30, 40, 50):
        full = rank == 1 and step in (20, 40, 50)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000 if full else most, most))
        try:
            kept.save(shards(truth(step), (0, 1), (rank, world_size), True), Meta(step, step))
            kept.wait()
        except OSError as error:
            ended = str(error)
            break
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    kept._failures = 0
    newest = kept.newest()
    kept.close()
    return said, [str(newest)], ended


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk_never_kills_a_healthy_run_before_its_time(tmp_path: Path, asynchronous: bool) -> None:
    first, second = run_ranks(_full_disk, 2, str(tmp_path), asynchronous)
    said, newest, ended = first
    assert [re.sub(r" after .*", "", text) for text in said] == [
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
    checkpoint._PAUSE_SECONDS = 0.01
    said: list[str] = []
    group = torch.distributed.group.WORLD
    kept = Checkpoints(f"{folder}/node{rank}", CheckpointConfig(), rank, world_size, group, said.append)
    kept.save(shards(truth(), (0, 1), (rank, world_size), True), Meta(10, 10))
    kept.close()
    return said


def test_directories_that_are_not_shared_are_noticed(tmp_path: Path) -> None:
    said = run_ranks(_own_disks, 2, str(tmp_path))[0]
    assert said == [
        "checkpoint of step 10 failed (1 of 3): rank-00001.safetensors is missing as rank 0 sees it: "
        f"all ranks must share {tmp_path}/node0"
    ]
    assert list(tmp_path.glob("*/step-*")) == []


def test_an_asynchronous_save_holds_the_moment_it_was_asked(tmp_path: Path) -> None:
    kept, _ = _saved(tmp_path)
    held = shards(truth(1), (0, 1), (0, 1), True)
    for step in (1, 2, 3):
        kept.save(held, Meta(step, step))
        kept.wait_for_copy()
        for shard in held:
            shard.values.add_(1)  # while it is written
    kept.close()
    assert _steps(tmp_path) == [2, 3]
    got = emptied(shards(truth(1), (0, 1), (0, 1), True))
    load(tmp_path / "step-00000003", got)
    assert all(torch.equal(shard.values, truth(1)[shard.name].reshape(-1) + 1 + 1) for shard in got)
