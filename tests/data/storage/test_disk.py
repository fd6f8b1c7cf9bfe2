"""A tree of files on a disk: what is published is complete, whatever a crash leaves."""

import os
from itertools import islice

import pytest

from data.storage import disk
from data.storage.disk import DiskStore, numbered_paths


def _publish(store, name, content):
    store.write(f"{store.staging_name(name)}/x", content)
    store.publish(name)


def test_an_entry_appears_when_it_is_published(tmp_path):
    store = DiskStore(str(tmp_path))
    store.write(f"{store.staging_name('step-1')}/x", b"half")
    assert store.entries("step-1") == []
    store.publish("step-1")
    assert store.entries() == ["step-1"] and store.read("step-1/x") == b"half"
    _publish(store, "step-1", b"again")
    assert os.listdir(tmp_path) == ["step-1"] and store.read("step-1/x") == b"again"


@pytest.mark.parametrize(
    "left, entries",
    [
        ([".step-2.partial"], ["other", "step-1"]),
        ([".step-2.removed"], ["other", "step-1"]),
        ([".step-2.replaced"], ["other", "step-1", "step-2"]),  # killed between two renames
        ([".step-1.replaced"], ["other", "step-1"]),
        ([".step-2.superseded"], [".step-2.superseded", "other", "step-1"]),
        ([".other.partial"], [".other.partial", "other", "step-1"]),  # of another prefix
    ],
)
def test_what_a_crash_left_is_cleared_or_brought_back(tmp_path, left, entries):
    for name in ("step-1", "other", *left):
        (tmp_path / name).mkdir()
    DiskStore(str(tmp_path)).recover("step-")
    assert sorted(os.listdir(tmp_path)) == entries


def test_what_is_set_aside_is_kept_under_names_of_its_own(tmp_path):
    store = DiskStore(str(tmp_path))
    for content in (b"first", b"second", b"third"):
        _publish(store, "step-1", content)
        store.set_aside("step-1")
    kept = [store.read(f".step-1.superseded{number}/x") for number in ("", "-2", "-3")]
    assert kept == [b"first", b"second", b"third"] and len(os.listdir(tmp_path)) == 3
    assert [path.name for path in islice(numbered_paths(tmp_path / "x"), 3)] == ["x", "x-2", "x-3"]


def test_a_large_file_is_passed_to_the_disk_as_it_is_written(tmp_path, monkeypatch):
    advised = []
    monkeypatch.setattr(disk, "_WRITE_BACK_BYTES", 100)
    monkeypatch.setattr(os, "posix_fadvise", lambda file, offset, size, advice: advised.append((offset, size)))
    file = DiskStore(str(tmp_path)).create("a/b")
    for size in (60, 60, 250):
        file.write(bytes(size))
    file.close()
    assert advised == [(0, 120), (120, 250)] and (tmp_path / "a/b").stat().st_size == 370


def test_system_calls_reach_its_files(tmp_path):
    assert DiskStore(f"file://{tmp_path}").local_path == tmp_path == DiskStore(str(tmp_path)).child("a").local_path.parent


def test_a_link_is_removed_and_what_it_points_to_stays(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/x").write_text("kept")
    (tmp_path / "store").mkdir()
    for name in ("step-00000001", ".step-00000002.partial", ".step-00000003.removed"):
        (tmp_path / "store" / name).symlink_to(tmp_path / "outside")
    store = DiskStore(str(tmp_path / "store"))
    store.remove("step-00000001")
    store.recover("step-")
    assert os.listdir(tmp_path / "store") == [] and (tmp_path / "outside/x").read_text() == "kept"
