"""Addresses as text; whose fault an error is."""

import errno

import pytest
from pyarrow import fs

from data.storage.addresses import (
    absolute_path,
    hide_login,
    inside,
    is_remote,
    join_address,
    listed_address,
    locate,
    named_errors,
    raise_outage,
)


def test_what_is_remote():
    assert not is_remote("file:///a") and not is_remote("/a") and not is_remote("a?b") and is_remote("gs://a/b")


def test_a_name_is_joined_before_the_query():
    assert join_address("a/b/", "c") == "a/b/c" and join_address("/a/b", "c") == "/a/b/c"
    assert join_address("s3://b/a?x=1", "c", "d") == "s3://b/a/c/d?x=1"
    assert join_address("s3://b/a/?x=1", "step") == "s3://b/a/step?x=1"
    assert join_address("a?b", "c") == "a?b/c"  # a local name may hold a question mark
    assert join_address("file:///a/b/", "c") == "file:///a/b/c"


def test_a_listed_file_has_the_address_of_its_pattern():
    assert listed_address("s3://k:s@b/a/*?x=1", "b/a/c") == "s3://k:s@b/a/c?x=1"
    assert listed_address("file:///a/*", "/a/c") == "file:///a/c"
    assert listed_address("hdfs://host:1/a", "/a/c") == "hdfs://host:1/a/c"
    assert listed_address("a/*", "/here/a/c") == "/here/a/c"


def test_a_login_is_not_shown():
    assert hide_login("s3://k:s@b/a@c?x=1") == "s3://b/a@c?x=1" and hide_login("a@b/c") == "a@b/c"


def test_a_path_is_located_on_the_local_file_system(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for address in ("x/y", f"{tmp_path}/x/y", f"file://{tmp_path}/x/y/"):
        system, path = locate(address)
        assert isinstance(system, fs.LocalFileSystem) and path == f"{tmp_path}/x/y"
    with pytest.raises(ValueError, match=r"cannot open the address 'nothing://h/x': .*; write a local path or a URI"):
        locate("nothing://k:s@h/x")


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """in/s.txt, far/deep, and the links in/file -> far/t.txt and in/link -> far/deep; in `in`, which is HOME too."""
    (tmp_path / "in").mkdir()
    (tmp_path / "far/deep").mkdir(parents=True)
    for name in ("in/s.txt", "in/deep.txt", "far/t.txt", "far/s.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "in/file").symlink_to(tmp_path / "far/t.txt")
    (tmp_path / "in/link").symlink_to(tmp_path / "far/deep")
    monkeypatch.chdir(tmp_path / "in")
    monkeypatch.setenv("HOME", str(tmp_path / "in"))
    return tmp_path


@pytest.mark.parametrize(
    ("spelled", "meant"),
    [
        ("s.txt", "in/s.txt"),
        ("./s.txt", "in/s.txt"),
        ("../in/s.txt", "in/s.txt"),
        ("../in/../in//./s.txt", "in/s.txt"),
        ("~/s.txt", "in/s.txt"),
        ("~/../far/t.txt", "far/t.txt"),
        ("nowhere/../s.txt", "in/s.txt"),
        (".", "in"),
        ("..", ""),
        ("../in/", "in"),
        ("link/../s.txt", "far/s.txt"),  # the parent of what the link points to
        ("link/../../in/s.txt", "in/s.txt"),
        ("link/x/../s.txt", "in/link/s.txt"),
        ("link/x/../../s.txt", "far/s.txt"),
        ("file", "in/file"),  # links that are only passed keep their names
        ("link/s.txt", "in/link/s.txt"),
        ("../in/link/s.txt", "in/link/s.txt"),
        ("link/../../in/file", "in/file"),
        ("../in/*.txt", "in/*.txt"),
    ],
)
def test_a_path_has_one_spelling(tree, spelled, meant):
    assert absolute_path(spelled) == f"{tree}/{meant}".rstrip("/") == locate(spelled)[1]
    assert absolute_path(f"{tree}/in/{spelled}" if spelled[0] != "~" else spelled) == f"{tree}/{meant}".rstrip("/")


@pytest.mark.parametrize("spelled", ["../in/s.txt", "link/../s.txt", "link/../../in/deep.txt", "file", "link/x/../../s.txt"])
def test_a_path_means_what_the_system_says(tree, spelled):
    (tree / "far/deep/x").mkdir()
    with open(spelled) as asked, open(absolute_path(spelled)) as found:
        assert asked.read() == found.read()


def test_the_root_is_its_own_parent():
    assert absolute_path("/") == absolute_path("/..") == absolute_path("/../../.") == "/"


def test_a_user_that_is_not_known_is_a_name(tree):
    assert absolute_path("~nobody-of-this-name/x") == f"{tree}/in/~nobody-of-this-name/x"


@pytest.mark.parametrize("use", [locate, absolute_path, lambda address: join_address(address, "train")])
def test_an_empty_address_is_refused(use):
    """It meant the working directory, and the root with a name behind it."""
    with pytest.raises(ValueError, match="an address is empty: name a file or a directory"):
        use("")


def test_an_error_names_the_address():
    with pytest.raises(FileNotFoundError, match=r"^'s3://b/x': two lines$"), named_errors("s3://k:s@b/x"):
        raise FileNotFoundError("two\nlines")
    with pytest.raises(OSError, match="No space left on device: 'x'") as caught, named_errors("x"):
        raise OSError(errno.ENOSPC, "")
    assert caught.value.errno == errno.ENOSPC


def test_only_an_outage_is_raised_as_one():
    raise_outage("x", ValueError("AWS Error of the reader, who is no store"))
    raise_outage("x", OSError("of the file"))
    with pytest.raises(OSError, match=r"^'s3://b/x' cannot be used \(AWS Error 5\); check the address"):
        raise_outage("s3://k:s@b/x", OSError("AWS Error 5"))


OUTSIDE = [
    "../x", "a/../../x", "..", ".", "./x", "", "/etc/passwd", "//x", "a//b", "a/", "a\0b", "a\nb", "a\x1b[31m", "\\x", "C:x",
    "s3://b/x", "x?endpoint_override=a", "x#y", 7, None, ["x"], {"x": 1}, "\u202ex", "../" * 100_000,
]  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE, ids=range(len(OUTSIDE)))
@pytest.mark.parametrize("address", ["/data/model", "s3://bucket/model?region=x"])
def test_a_name_that_leads_out_is_refused(address, name):
    with pytest.raises(ValueError, match=r"^index.json names the file .{1,100}, wanted a relative path inside its directory;"):
        inside(address, name, "index.json")


def test_a_name_inside_is_an_address():
    assert inside("/data/model/", "model-1.safetensors", "") == "/data/model/model-1.safetensors"
    assert inside("model", "a b/..c/数据", "") == "model/a b/..c/数据"
    assert inside("s3://bucket/model?region=x", "a/b", "") == "s3://bucket/model/a/b?region=x"
