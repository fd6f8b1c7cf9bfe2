import hashlib
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from data.config import DataConfig
from data.corpus.shards import (
    Corpus,
    CorpusManifest,
    ShardDraft,
    ShardInfo,
    read_corpus_manifest,
    token_dtype,
    write_corpus_manifest,
    write_shard,
)
from data.corpus.stream import Samples
from data.ingest.prepare import prepare


def test_a_shard_is_an_arrow_file_that_anyone_can_read(tmp_path):
    draft, documents = ShardDraft(token_dtype(70_000)), [[5, 69_999], [], [7]]
    for tokens in documents:
        draft.add(np.array(tokens), end_of_text=1)
    info = write_shard(str(tmp_path / "shard.arrow"), draft)
    content = (tmp_path / "shard.arrow").read_bytes()
    assert info.sha256 == hashlib.sha256(content).hexdigest() and info.bytes == len(content)
    assert np.frombuffer(content, np.uint32, 6, info.tokens_at).tolist() == [5, 69_999, 1, 1, 7, 1]
    table = pa.ipc.open_file(pa.memory_map(str(tmp_path / "shard.arrow"))).read_all()
    assert table["tokens"].to_pylist() == [[5, 69_999, 1], [1], [7, 1]]
    assert (info.tokens, info.documents) == (6, 3)


def test_the_narrowest_type_holds_every_token():
    assert [token_dtype(size).name for size in (300, 1 << 16, (1 << 16) + 1)] == ["uint16", "uint16", "uint32"]


def test_a_manifest_comes_back_and_its_fingerprint_names_tokens_and_tokenizer(tmp_path):
    shard = ShardInfo("shard-000000.arrow", 6, 3, 1000, 128, "ab" * 32)
    manifest = CorpusManifest("t" * 64, 400, 1, "uint16", [shard], {"documents": 3}).sealed()
    write_corpus_manifest(str(tmp_path), manifest)
    assert read_corpus_manifest(str(tmp_path)) == manifest
    other = replace(shard, sha256="cd" * 32)
    prints = {replace(manifest, **change).sealed().fingerprint for change in ({}, {"shards": [other]}, {"tokenizer": "u" * 64})}
    assert len(prints) == 3 and manifest.fingerprint in prints
    assert replace(manifest, counts={}).sealed().fingerprint == manifest.fingerprint
    with pytest.raises(FileNotFoundError):
        read_corpus_manifest(str(tmp_path / "nowhere"))


@pytest.fixture
def prepared(tmp_path, corpus_jsonl, tokenizer_directory):
    prepare([corpus_jsonl], tokenizer_directory, str(tmp_path), task_bytes=60_000)
    return tmp_path


def test_a_slice_across_shards_is_what_the_shards_hold(prepared):
    folder = prepared / "train"
    files = [str(folder / shard.file) for shard in read_corpus_manifest(str(folder)).shards]
    columns = [pa.ipc.open_file(pa.memory_map(file)).read_all()["tokens"].combine_chunks() for file in files]
    joined = np.concatenate([column.values.to_numpy() for column in columns])
    corpus = Corpus(str(folder))
    assert len(files) > 2 and corpus.tokens == len(joined)
    first = len(columns[0].values)
    assert np.array_equal(corpus.read(first - 3, first + 5), joined[first - 3 : first + 5])
    corpus.close()


def test_a_shard_of_another_size_is_refused_when_it_is_read(prepared):
    folder = prepared / "train"
    (folder / read_corpus_manifest(str(folder)).shards[0].file).write_bytes(b"short")
    samples = Samples([(0, DataConfig(train=str(folder)).sources("train"))], 32, 0)
    with pytest.raises(ValueError, match="5 bytes where its manifest says"):
        samples.window(0, 0)
