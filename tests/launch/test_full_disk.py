"""A whole run on a disk that fills up: it says what it cannot write and where, and continues once there is room."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.checkpoints import find_checkpoint, read_tensor, tensor_names, verify_checkpoint
from tests.launch.faults import run_main
from trainer.monitoring.records import FILE_NAME, read_records

ROOT = Path(__file__).parent.parent.parent
OPTIONS = ("train.steps=36", "log.tensorboard=true")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """16 MB of memory as a file system of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tiglon", str(place)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("needs the program mount")
    if mounted.returncode:
        pytest.skip(f"no right to mount a file system: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(path: Path) -> None:
    """Write until nothing more fits."""
    with path.open("wb", buffering=0) as file:
        for size in (1 << 16, 1):
            try:
                while file.write(b"0" * size):
                    pass
            except OSError:
                continue


def losses(directory: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in read_records(directory / FILE_NAME) if record["kind"] == "train"}


def begun(configuration: str, directory: Path, *options: str) -> subprocess.Popen[str]:
    """A run that has saved its first checkpoint."""
    command = [sys.executable, "-m", "launch", "train", configuration, f"run.dir={directory}", *OPTIONS, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    place = next((Path(option.partition("=")[2]) for option in options if "directory=" in option), directory / "checkpoints")
    while not list(place.glob("step-*")):
        assert process.poll() is None
        time.sleep(0.01)
    return process


@pytest.mark.slow
def test_records_that_find_no_room_at_the_end_are_kept_elsewhere_and_said(configuration: str, tmp_path: Path, small_disk: Path):
    directory = small_disk / "run"
    process = begun(configuration, directory, f"checkpoint.directory={tmp_path}/checkpoints", "train.steps=60")
    fill(small_disk / "filler")
    screen = process.communicate(timeout=120)[1]
    assert process.returncode == 1, screen
    path = directory / FILE_NAME
    assert f"tiglon: step 60: {path} lacks its last records (No space left on device)" in screen
    assert f"the newest complete checkpoint is {tmp_path}/checkpoints/step-00000060" in screen
    assert "done: " not in screen and "Traceback" not in screen
    kept = re.search(r" are in (\S+), from where the next start on this computer takes them", screen)
    assert kept is not None
    (small_disk / "filler").unlink()
    options = [f"run.dir={directory}", f"checkpoint.directory={tmp_path}/checkpoints", *OPTIONS, "train.steps=60"]
    statuses, screen = run_main(1, tmp_path / "screens", [configuration, *options])
    assert statuses == [0] and sorted(losses(directory)) == list(range(1, 61)) and not Path(kept[1]).exists(), screen


@pytest.mark.slow
def test_a_disk_that_fills_up_ends_the_run_with_a_sentence_and_costs_nothing(
    configuration: str, tmp_path: Path, small_disk: Path
):
    directory = small_disk / "run"
    process = begun(configuration, directory)
    fill(small_disk / "filler")
    screen = process.communicate(timeout=120)[1]
    assert process.returncode == 1, screen
    kept = find_checkpoint(directory)
    verify_checkpoint(kept)
    assert (
        f"tiglon: 3 checkpoints in a row could not be written to {directory}/checkpoints: "
        "rank 0: No space left on device; the run ends (checkpoint.max_failures)"
    ) in screen
    assert f"metrics: {directory}/metrics.jsonl cannot be written (No space left on device); training is not affected" in screen
    assert "Traceback" not in screen
    (small_disk / "filler").unlink()
    screens = tmp_path / "screens"
    statuses, screen = run_main(1, screens, [configuration, f"run.dir={directory}", *OPTIONS])
    assert statuses == [0] and f"resumed from {kept}" in screen
    assert run_main(1, screens, [configuration, f"run.dir={tmp_path}/whole", *OPTIONS])[0] == [0]
    assert losses(directory) == losses(tmp_path / "whole")
    one, other = find_checkpoint(directory), find_checkpoint(tmp_path / "whole")
    assert tensor_names(one) == tensor_names(other)
    assert all(read_tensor(one, name).equal(read_tensor(other, name)) for name in tensor_names(one))
