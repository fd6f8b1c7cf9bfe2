"""Whole files by address."""

import uuid

import pytest

from data.storage.files import (
    MAX_JSON_BYTES,
    exists,
    read_bytes,
    read_json,
    refuse_lfs_pointer,
    remove,
    remove_drafts,
    replace_file,
    write_atomic,
)


def test_files_appear_complete_or_not_at_all(tmp_path):
    write_atomic(str(tmp_path / "new/x"), b"old")
    with pytest.raises(TypeError):
        write_atomic(str(tmp_path / "new/x"), 5)
    assert read_bytes(str(tmp_path / "new/x")) == b"old" and exists(str(tmp_path / "new"))
    assert not list(tmp_path.rglob("*.partial"))
    (tmp_path / "new" / f"y.{uuid.uuid4().hex}.partial").write_bytes(b"left by a kill")
    for others in ("film.partial", "y.0123.partial", f"{uuid.uuid4().hex}.partial"):
        (tmp_path / "new" / others).write_bytes(b"a stranger's")
    (tmp_path / "new" / f"below.{uuid.uuid4().hex}").mkdir()
    remove_drafts(str(tmp_path))
    assert len(list((tmp_path / "new").iterdir())) == 6
    remove_drafts(str(tmp_path / "new"))
    assert len(list((tmp_path / "new").iterdir())) == 5
    remove(str(tmp_path / "new"))
    assert not exists(str(tmp_path / "new"))
    remove(str(tmp_path / "new"))  # as far as that is possible


def test_a_file_that_cannot_be_replaced_stays(tmp_path):
    path = tmp_path / "x"
    replace_file(path, b"old")
    replace_file(path, b"new")
    with pytest.raises(TypeError):
        replace_file(path, 5)
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]
    (tmp_path / ".x.new").mkdir()  # where the draft goes
    with pytest.raises(OSError):
        replace_file(path, b"lost")
    assert path.read_bytes() == b"new"


def test_a_pointer_of_git_lfs_is_no_file(tmp_path):
    (tmp_path / "x").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(ValueError, match="x is a Git LFS pointer, not the file itself; run git lfs pull"):
        refuse_lfs_pointer(tmp_path / "x")
    (tmp_path / "x").write_text("version 1")
    refuse_lfs_pointer(tmp_path / "x")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[" * 200_000, "nests more deeply"),
        (b'{"a":' * 200_000, "nests more deeply"),
        (b"9" * 5000, "is not JSON"),
        (b'{"a": {"b": 1, "b": 2}}', "a key stands twice"),
        (b"\xff\xfe\xfd", "is not JSON"),
        (b"", "is not JSON"),
    ],
)
def test_json_that_is_none_of_ours_is_one_sentence(tmp_path, content, words):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        read_json(str(tmp_path / "x.json"))
    assert str(tmp_path / "x.json") in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_json_of_gigabytes_is_not_read(tmp_path):
    with open(tmp_path / "x.json", "wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)  # takes no room on the disk
    with pytest.raises(ValueError, match="at most"):
        read_json(str(tmp_path / "x.json"))
    (tmp_path / "y.json").write_text('{"a": [1, null]}')
    assert read_json(str(tmp_path / "y.json")) == {"a": [1, None]}
