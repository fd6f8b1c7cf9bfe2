import hashlib
import json
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


def test_documents_begin_where_arrow_says(prepared):
    folder = prepared / "train"
    files = [str(folder / shard.file) for shard in read_corpus_manifest(str(folder)).shards]
    lengths = [len(row) for file in files for row in pa.ipc.open_file(file).read_all()["tokens"].to_pylist()]
    assert len(files) > 2 and np.array_equal(Corpus(str(folder)).document_starts(), np.cumsum([0, *lengths]))


@pytest.mark.parametrize("key", ["documents", "tokens_at"])
def test_a_shard_without_boundaries_before_its_tokens_is_refused(part, key):
    manifest = read_corpus_manifest(str(part))
    shard = replace(manifest.shards[0], **{key: getattr(manifest.shards[0], key) - 1})
    write_corpus_manifest(str(part), replace(manifest, shards=[shard]))
    with pytest.raises(ValueError, match=r"no boundaries of \d documents before its tokens: prepare"):
        Corpus(str(part)).document_starts()
    write_corpus_manifest(str(part), replace(manifest, shards=[replace(shard, tokens_at=8)]))
    with pytest.raises(ValueError, match="no boundaries"):
        Corpus(str(part)).document_starts()


def test_a_shard_of_another_size_is_refused_when_it_is_read(prepared):
    folder = prepared / "train"
    (folder / read_corpus_manifest(str(folder)).shards[0].file).write_bytes(b"short")
    samples = Samples([(0, DataConfig(train=str(folder)).sources("train"))], 32, 0)
    with pytest.raises(ValueError, match="5 bytes where its manifest says"):
        samples.window(0, 0)


@pytest.fixture
def part(tmp_path):
    """A part of two documents, [5, 399, 1] and [7, 1]."""
    draft = ShardDraft(token_dtype(400))
    for tokens in ([5, 399], [7]):
        draft.add(np.array(tokens), end_of_text=1)
    info = write_shard(str(tmp_path / "part/shard-000000.arrow"), draft)
    write_corpus_manifest(str(tmp_path / "part"), CorpusManifest("t" * 64, 400, 1, "uint16", [info], {}).sealed())
    (tmp_path / "secret").write_bytes((tmp_path / "part/shard-000000.arrow").read_bytes())
    return tmp_path / "part"


HOSTILE = {
    **{
        f"file {name!r}": ("shard", "file", name)
        for name in ("../secret", "/etc/passwd", "a/../../secret", "..", "", "a\0", 7, None)
    },
    "more tokens than bytes": ("shard", "tokens", 1 << 40),
    "negative tokens": ("shard", "tokens", -1),
    "half a token": ("shard", "tokens", 2.5),
    "true": ("shard", "tokens", True),
    "text": ("shard", "tokens", "5"),
    "huge tokens": ("shard", "tokens", 1 << 70),
    "negative start": ("shard", "tokens_at", -8),
    "start behind the end": ("shard", "tokens_at", 1 << 40),
    "negative documents": ("shard", "documents", -1),
    "more documents than tokens": ("shard", "documents", 6),
    "checksum": ("shard", "sha256", 7),
    "unknown key": ("shard", "url", "http://a.example"),
    "object dtype": ("part", "dtype", "O"),
    "signed dtype": ("part", "dtype", "int16"),
    "dtype": ("part", "dtype", ["uint16"]),
    "vocabulary": ("part", "vocab_size", "400"),
    "separator": ("part", "end_of_text", -1),
    "tokenizer": ("part", "tokenizer", None),
    "counts": ("part", "counts", [1]),
    "shards": ("part", "shards", 7),
    "a shard": ("part", "shards", ["x"]),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_manifest_that_cannot_be_true_is_refused(part, case):
    where, key, value = HOSTILE[case]
    manifest = json.loads((part / "manifest.json").read_text())
    (manifest["shards"][0] if where == "shard" else manifest)[key] = value
    (part / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="prepare the corpus again") as caught:
        Corpus(str(part))
    assert str(part) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize(("start", "stop"), [(0, 5), (1, 2)])
def test_a_token_outside_the_vocabulary_is_refused_where_it_is_read(part, start, stop):
    """Fed to a network it is an index out of range: on a GPU an error of the whole process."""
    assert Corpus(str(part)).read(start, stop).max() == 399
    manifest = json.loads((part / "manifest.json").read_text())
    (part / "manifest.json").write_text(json.dumps(manifest | {"vocab_size": 399}))
    with pytest.raises(ValueError, match="holds token 399, but the vocabulary of its manifest has 399"):
        Corpus(str(part)).read(start, stop)
    assert Corpus(str(part)).read(2, 5).tolist() == [1, 7, 1] and not len(Corpus(str(part)).read(2, 2))
