"""A corpus made from and into an object store: a real S3-compatible server on loopback."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from data import storage
from data.config import DataConfig
from data.corpus.audit import audit_corpus
from data.corpus.shards import read_corpus_manifest
from data.corpus.stream import BatchShape, Stream
from data.ingest.prepare import PrepareOptions, prepare
from data.tokenizer.tokenizer import Tokenizer
from data.tokenizer.train import train_tokenizer

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
        prepare(
            [source], tokenizer, output, PrepareOptions(validation_fraction=0.3, deduplicate=True), task_bytes=15_000, workers=1
        )
    trains = [storage.join_address(output, "train") for output in outputs]
    assert read_corpus_manifest(trains[0]) == read_corpus_manifest(trains[1])
    assert len(read_corpus_manifest(trains[0]).shards) > 3
    prepare(
        [there],
        tokenizers[0],
        outputs[0],
        PrepareOptions(validation_fraction=0.3, deduplicate=True),
        task_bytes=15_000,
        workers=1,
    )
    assert not audit_corpus(trains[0]).faults
    streams = [
        Stream(DataConfig(train=train, tokenizer=tokenizer), "train", BatchShape(64, 8, 8), 0, 1, 0)
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
        storage.write_atomic(f"{root.replace('corpus', 'nobody-s')}/x.txt{query}", b"x")
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


def test_an_address_is_opened_where_it_is(tmp_path, bucket):
    root, query = bucket
    assert isinstance(storage.open_store(str(tmp_path)), storage.DiskStore)
    assert isinstance(storage.open_store(f"file://{tmp_path}"), storage.DiskStore)
    assert isinstance(storage.open_store(f"{root}/a{query}"), storage.ObjectStore)
    with pytest.raises(ValueError, match="cannot open the address 'nothing://x'"):
        storage.open_store("nothing://x")
    with pytest.raises(ValueError, match="s3:// names no bucket"):
        storage.open_store("s3://")
