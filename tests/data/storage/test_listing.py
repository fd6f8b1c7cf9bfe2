"""Which files an address means."""

import glob
import os

import pytest
from pyarrow import fs

from data.storage.listing import list_files, list_tree

NAMES = (
    "x.txt", "_SUCCESS", "_metadata", "_SUCCESS_story.txt", "_metadata_of_book.txt", ".hidden", ".hid/x.txt", "__init__.py",
    "a/y.txt", "a/[z].txt", "a/b/c/x.txt", "a/.hid/x.txt", "a/.hidden.txt", "_temporary/0/x.txt", "_temporary_notes/x.txt",
    "_metadata_/x.txt",
)  # fmt: skip


@pytest.fixture
def tree(tmp_path):
    for name in NAMES:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(name)
    return tmp_path


def below(tree, address):
    return [path.removeprefix(f"{tree}/") for path, _ in list_files(address)]


def test_of_a_folder_hidden_files_and_bookkeeping_are_left_out(tree):
    """A name that only begins as one of Spark's is another file."""
    gone = {"_SUCCESS", "_metadata", ".hidden", ".hid/x.txt", "a/.hid/x.txt", "a/.hidden.txt", "_temporary/0/x.txt"}
    assert below(tree, str(tree)) == sorted({*NAMES} - gone)
    assert list_files(f"{tree}/a/[z].txt") == [(f"{tree}/a/[z].txt", 9)]
    assert [path for path, _ in list_files(f"file://{tree}/a/y*")] == [f"{tree}/a/y.txt"]


@pytest.mark.parametrize(
    "pattern",
    ["*", "*.txt", "**", "**/*.txt", "**.txt", "**/x.txt", "a/**/*.txt", "a/**", "*/*.txt", ".*/*.txt", "**/.hid/*", "a/.*.txt",
     "**/b/**/*.txt", "a/**/x.txt", "**/**/y.txt", "[_x]*", "?.txt", "a/[[]z].txt", "a/b/*/x.*", "_*/**", "**/[!x].txt"],
)  # fmt: skip
def test_a_pattern_means_what_it_means_to_pythons_glob(tree, monkeypatch, pattern):
    monkeypatch.chdir(tree)
    wanted = sorted({path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)})
    assert below(tree, pattern) == wanted == below(tree, f"{tree}/{pattern}") and wanted


@pytest.mark.parametrize("pattern", ["a/**/*.txt", "**/x.txt", ".*/*.txt", "*", "a"])
def test_objects_of_a_store_are_listed_as_files_are(tree, monkeypatch, pattern):
    wanted = below(tree, f"{tree}/{pattern}")
    store = fs.SubTreeFileSystem(str(tree), fs.LocalFileSystem())  # any file system but the local one
    monkeypatch.setattr("data.storage.listing.locate", lambda address: (store, address.removeprefix("s3://bucket").strip("/")))
    assert [path for path, _ in list_files(f"s3://bucket/{pattern}")] == wanted


def test_nothing_listed_is_one_sentence(tree):
    with pytest.raises(FileNotFoundError, match=r"no files at '.*/b\*'; give a file, a folder or a pattern"):
        list_files(f"{tree}/b*")
    assert list_files(f"{tree}/b*", empty_ok=True) == list_files(f"{tree}/none", empty_ok=True) == []


def test_links_are_followed_but_not_to_where_they_are(tree, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    (outside / "far.txt").write_text("far")
    for name, target in {"a/up": tree, "a/self": "self", "gone.txt": "nowhere", "out": outside, "z.txt": "x.txt"}.items():
        (tree / name).symlink_to(target)
    (outside / "back").symlink_to(tree / "a")  # a, out, back, a: a circle through two links
    (tree / "a/out").symlink_to(outside)
    listing = list_tree(str(tree))
    assert [path for path in listing.broken_links if "back" not in path] == [f"{tree}/a/self", f"{tree}/gone.txt"]
    files = [path for path, _ in listing.files]
    assert {f"{tree}/out/far.txt", f"{tree}/a/out/far.txt", f"{tree}/z.txt"} <= {*files} and len(files) < 40
    assert not any("/up/" in path for path in files)
    assert list_tree(f"{tree}/g*").broken_links == [f"{tree}/gone.txt"] and list_tree(f"{tree}/*.md").broken_links == []


@pytest.mark.parametrize("name", [b"caf\xe9.txt", b"caf\xe9/x.txt", b"a/\xff.txt"])
def test_a_name_that_is_not_utf_8_is_one_sentence(tree, name):
    path = os.path.join(os.fsencode(tree), name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w"):
        pass
    shown = ascii(os.fsdecode(name))
    with pytest.raises(ValueError, match="not UTF-8; rename") as told:
        list_files(str(tree))
    assert f"'{tree}' holds {shown}" in str(told.value) and "\n" not in str(told.value)
    with pytest.raises(ValueError, match="not UTF-8; rename") as told:
        list_files(os.fsdecode(path))
    assert str(told.value).isascii() and shown.strip("'") in str(told.value)
    assert list_files(f"{tree}/x*") and list_files(f"{tree}/*/[yz].txt")  # which do not meet it
