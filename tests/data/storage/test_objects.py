"""An object store (a real S3 protocol on loopback) answers as a disk does, but for what cannot be renamed."""

import numpy as np
import pytest

from data.corpus.shards import Corpus, read_corpus_manifest
from data.storage import open_store
from tests.object_store import served_bucket
from tests.shards import write_corpus


@pytest.fixture(scope="module")
def bucket():
    with served_bucket() as address:
        yield open_store(address)


@pytest.fixture(params=["disk", "objects"])
def store(request, tmp_path):
    return open_store(str(tmp_path)) if request.param == "disk" else request.getfixturevalue("bucket").child("contract")


def test_what_is_written_is_read(store):
    store.write("a/x", b"0123456789")
    assert store.read("a/x") == b"0123456789" and store.size("a/x") == 10
    assert store.entries() == ["a"] and store.entries("a") == ["x"] and store.entries("nothing") == []
    assert store.child("a").read("x") == b"0123456789" and store.child("a").address == store.join("a")
    file, buffer = store.open("a/x"), bytearray(4)
    assert file.read_into(3, memoryview(buffer)) == 4 and buffer == b"3456"
    assert file.read_into(8, memoryview(buffer)) == 2 and buffer[:2] == b"89"
    file.close()
    file = store.create("a/y")
    file.write(b"one")
    file.write(memoryview(b"two"))
    file.close()
    assert store.read("a/y") == b"onetwo"
    store.remove("a")
    assert store.entries() == []


def test_what_is_not_there_is_said(store):
    assert store.modified("nothing") is None
    for ask in (store.size, store.read, store.open):
        with pytest.raises(FileNotFoundError):
            ask("nothing")
    store.remove("nothing")


def test_a_file_knows_when_it_was_written(store):
    store.write("first", b"")
    first = store.modified("first")
    store.write("second", b"")
    assert 0 <= store.modified("second") - first < 60
    for name in ("first", "second"):
        store.remove(name)


def test_an_entry_without_a_manifest_is_what_a_crash_left(bucket):
    store = bucket.child("crash")
    assert store.staging_name("step-1") == "step-1" and store.local_path is None
    for name in ("step-1/x", "step-1/manifest.json", "step-2/x", "other/x", "step-3/x", "step-3/manifest.json"):
        store.write(name, b"1")
    store.set_aside("step-3")
    assert store.entries("step-3") == ["manifest.superseded.json", "x"]
    store.recover("step-")
    assert store.entries() == ["other", "step-1", "step-3"]
    store.remove("step-1")
    assert store.entries() == ["other", "step-3"]


def test_documents_of_a_corpus_begin_where_they_do_on_a_disk(bucket, tmp_path):
    lengths = [3, 1, 12, 4]
    there = bucket.child("corpus")
    on_disk = write_corpus(tmp_path / "corpus", np.ones(20, np.int64), lengths=lengths)
    for file in ("manifest.json", read_corpus_manifest(on_disk).shards[0].file):
        there.write(file, (tmp_path / "corpus" / file).read_bytes())
    assert Corpus(there.address).document_starts().tolist() == np.cumsum([0, *lengths]).tolist()
