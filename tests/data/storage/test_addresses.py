"""Addresses as text; whose fault an error is."""

import errno

import pytest
from pyarrow import fs

from data.storage.addresses import (
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
