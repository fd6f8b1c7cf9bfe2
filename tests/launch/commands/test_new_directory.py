"""A directory that a command writes is there completely, or not at all."""

from pathlib import Path

import pytest

from launch.commands.new_directory import new_directory, whole_or_nothing


def test_it_appears_when_all_is_written(tmp_path: Path):
    store, name = new_directory(tmp_path / "new")
    with whole_or_nothing(store, name, tmp_path / "new") as staging:
        store.write(f"{staging}/file", b"content")
        assert not (tmp_path / "new").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert (tmp_path / "new" / "file").read_bytes() == b"content"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_nothing(error: type[BaseException], tmp_path: Path):
    store, name = new_directory(tmp_path / "new")
    with pytest.raises(error), whole_or_nothing(store, name, tmp_path / "new") as staging:
        store.write(f"{staging}/file", b"content")
        assert list(tmp_path.iterdir())
        raise error
    assert not list(tmp_path.iterdir())


def test_what_a_kill_has_left_is_not_part_of_the_next(tmp_path: Path):
    store, name = new_directory(tmp_path / "new")
    left = tmp_path / store.staging_name(name)
    left.mkdir()
    (left / "old").touch()
    with whole_or_nothing(store, name, tmp_path / "new") as staging:
        store.write(f"{staging}/file", b"content")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]


def test_a_full_directory_and_an_object_store_are_refused(tmp_path: Path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match=r"--output .*full exists and is not empty; give a new directory"):
        new_directory(tmp_path / "full")
    with pytest.raises(ValueError, match="must be a local directory"):
        new_directory(Path("s3://bucket/new"))
    (tmp_path / "empty").mkdir()
    assert new_directory(tmp_path / "empty")[1] == "empty"
