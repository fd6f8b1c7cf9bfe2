"""Local addresses, and a real S3-compatible server on loopback."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from data import storage
from data.audit import audit_corpus
from data.config import DataConfig
from data.prepare import prepare
from data.shards import read_manifest
from data.stream import Stream
from data.tokenizer import Tokenizer, train_tokenizer

boto3 = pytest.importorskip("boto3")
ThreadedMotoServer = pytest.importorskip("moto.server").ThreadedMotoServer


@pytest.fixture(scope="module")
def bucket():
    """(address of a bucket, its query)"""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    login = {"aws_access_key_id": "key", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=f"http://{host}:{port}", **login).create_bucket(Bucket="corpus")
    yield "s3://key:secret@corpus", f"?endpoint_override={host}:{port}&scheme=http&region=us-east-1"
    server.stop()


def test_preparing_from_an_object_store_and_into_it(tmp_path, bucket, documents, corpus_jsonl):
    root, query = bucket
    system, path = storage.locate(f"{root}/text{query}")
    for number in range(2):
        with system.open_output_stream(f"{path}/{number}.parquet") as file:
            pq.write_table(pa.table({"text": documents[number:70:2]}), file, row_group_size=20)
        pq.write_table(pa.table({"text": documents[number:70:2]}), tmp_path / f"{number}.parquet", row_group_size=20)
    there, here = f"{root}/text/*.parquet{query}", str(tmp_path / "*.parquet")
    tokenizers = [f"{root}/tokenizer{query}", str(tmp_path / "tokenizer")]
    assert train_tokenizer([there], tokenizers[0], 320).fingerprint == train_tokenizer([here], tokenizers[1], 320).fingerprint
    outputs = [f"{root}/out{query}", str(tmp_path / "out")]
    for source, tokenizer, output in zip((there, here), tokenizers, outputs):
        prepare([source], tokenizer, output, 1, 0.3, deduplicate=True, task_bytes=15_000)
    trains = [storage.join(output, "train") for output in outputs]
    assert read_manifest(trains[0]) == read_manifest(trains[1])
    assert len(read_manifest(trains[0]).shards) > 3
    prepare([there], tokenizers[0], outputs[0], 1, 0.3, deduplicate=True, task_bytes=15_000)
    assert not audit_corpus(trains[0]).faults
    streams = [
        Stream(DataConfig(train=train, tokenizer=tokenizer), "train", 64, 8, 8, 0, 1, 0)
        for train, tokenizer in zip(trains, tokenizers)
    ]
    assert streams[0].fingerprint == streams[1].fingerprint
    for step in (0, 1, 77):
        batches = [stream.batches(step)[0] for stream in streams]
        assert torch.equal(batches[0].inputs_BS, batches[1].inputs_BS)
        assert torch.equal(batches[0].targets_BS, batches[1].targets_BS)
    for stream in streams:
        stream.close()


def test_a_missing_bucket_is_one_sentence(bucket):
    root, query = bucket
    with pytest.raises(FileNotFoundError, match="no tokenizer"):
        Tokenizer.load(f"{root}/nowhere{query}")
    with pytest.raises(FileNotFoundError, match="no files at"):
        storage.list_files(f"{root}/nowhere/*.txt{query}")


def test_an_error_of_the_store_names_the_address_and_no_secret(bucket):
    root, query = bucket
    with pytest.raises(OSError, match=r"'s3://nobody-s/x.txt.*' cannot be used .*NO_SUCH_BUCKET") as caught:
        storage.write_whole(f"{root.replace('corpus', 'nobody-s')}/x.txt{query}", b"x")
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


def test_addresses(tmp_path):
    assert storage.hide_login("s3://k:s@b/a@c?x=1") == "s3://b/a@c?x=1" and storage.hide_login("a@b/c") == "a@b/c"
    assert storage.join("a/b/", "c") == "a/b/c"
    assert storage.join("s3://b/a?x=1", "c", "d") == "s3://b/a/c/d?x=1"
    assert storage.reopen("s3://k:s@b/a/*?x=1", "b/a/c") == "s3://k:s@b/a/c?x=1"
    assert storage.reopen("file:///a/*", "/a/c") == "file:///a/c"
    assert storage.reopen("hdfs://host:1/a", "/a/c") == "hdfs://host:1/a/c"
    for name in ("x.txt", "_SUCCESS", ".hidden", "__init__.py", "a/y.txt", "a/[z].txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    names = [path.removeprefix(f"{tmp_path}/") for path, _ in storage.list_files(str(tmp_path))]
    assert names == ["__init__.py", "a/[z].txt", "a/y.txt", "x.txt"]
    assert [path for path, _ in storage.list_files(f"file://{tmp_path}/a/y*")] == [f"{tmp_path}/a/y.txt"]
    assert storage.list_files(f"{tmp_path}/a/[z].txt") == [(f"{tmp_path}/a/[z].txt", 9)]
    assert len(storage.list_files(f"{tmp_path}/**.txt")) == 3 and len(storage.list_files(f"{tmp_path}/*.txt")) == 1


def test_files_appear_whole_or_not_at_all(tmp_path):
    storage.write_whole(str(tmp_path / "x"), b"old")
    with pytest.raises(TypeError):
        storage.write_whole(str(tmp_path / "x"), 5)
    assert storage.read_bytes(str(tmp_path / "x")) == b"old"
    assert not list(tmp_path.glob("*.partial"))
    (tmp_path / "y.0123.partial").write_bytes(b"left by a kill")
    storage.remove_drafts(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
