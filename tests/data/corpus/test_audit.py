import json

import numpy as np
import pytest

from data.config import DataConfig
from data.corpus.audit import audit_corpus, audit_plan, decoded_samples
from data.corpus.batches import BatchSizes
from data.corpus.shards import read_corpus_manifest
from data.ingest.prepare import PrepareOptions, prepare
from data.tokenizer.tokenizer import Tokenizer


@pytest.fixture
def prepared(tmp_path, corpus_jsonl, tokenizer_directory):
    prepare([corpus_jsonl], tokenizer_directory, str(tmp_path), PrepareOptions(validation_fraction=0.3), task_bytes=60_000)
    return tmp_path


def test_a_whole_corpus_has_no_faults(prepared, tokenizer_directory, documents):
    reports = [
        audit_corpus(str(prepared / part), near_empty_tokens=20, over_long_tokens=500) for part in ("train", "validation")
    ]
    tokenizer = Tokenizer.load(tokenizer_directory)
    lengths = [len(tokenizer.encode(text)) + 1 for text in documents]
    assert not any(report.faults for report in reports)
    assert sum(report.near_empty for report in reports) == sum(length < 20 for length in lengths) > 0
    assert sum(report.over_long for report in reports) == sum(length > 500 for length in lengths) > 0
    assert max(report.longest for report in reports) == max(lengths)
    bins = reports[0].lengths + reports[1].lengths
    assert bins == {b: n for b in range(20) if (n := sum(1 << b <= length < 2 << b for length in lengths))}
    shown = decoded_samples(str(prepared / "train"), tokenizer, 4)
    assert len(shown) == 4 and any(shown[0][:20] in text for text in documents)


def test_excerpts_are_of_positions_that_there_are(tmp_path, tokenizer_directory):
    (tmp_path / "a.txt").write_text("ab")
    prepare([str(tmp_path / "a.txt")], tokenizer_directory, str(tmp_path / "out"), PrepareOptions(0.0001))
    tokenizer, (train, held_out) = Tokenizer.load(tokenizer_directory), (f"{tmp_path}/out/{s}" for s in ("train", "validation"))
    assert decoded_samples(held_out, tokenizer, 3) == [], "it is empty"
    tokens = audit_corpus(train).manifest.shards[0].tokens
    assert len(decoded_samples(train, tokenizer, 1000)) == tokens < 5
    assert decoded_samples(train, tokenizer, 0) == []


@pytest.mark.parametrize("damage", ["byte", "missing", "manifest", "boundary"])
def test_damage_is_found(prepared, damage):
    folder = prepared / "train"
    info = read_corpus_manifest(str(folder)).shards[1]
    path, manifest = folder / info.file, json.loads((folder / "manifest.json").read_text())
    match damage:
        case "byte":
            data = bytearray(path.read_bytes())
            data[info.tokens_at + 100] ^= 1
            path.write_bytes(data)
        case "missing":
            path.unlink()
        case "manifest":
            manifest["shards"].pop()
        case "boundary":
            manifest["end_of_text"] = 7
    (folder / "manifest.json").write_text(json.dumps(manifest))
    faults = audit_corpus(str(folder)).faults
    assert faults and (damage not in ("byte", "missing") or (len(faults) == 1 and info.file in faults[0]))


def test_a_plan_reads_every_token_equally_often(prepared):
    train, held_out = str(prepared / "train"), str(prepared / "validation")
    config = DataConfig(
        train=[{"path": train, "weight": 2}, {"path": held_out, "weight": 1}],
        curriculum=[{"from_step": 30, "sources": [{"path": held_out}]}],
    )
    coverage, draws = audit_plan(config, 64, BatchSizes(16), 100, seed=5)
    assert all(item.exact for item in coverage)
    assert [item.drawn for item in coverage] == [320, 160 + 70 * 16]
    assert np.array_equal(draws.sum(axis=0), [320, 1280]) and np.all(draws[31:, 0] == 0)
    assert coverage[1].least == coverage[1].drawn // coverage[1].samples == 1


def test_a_mixture_is_drawn_over_batches_of_any_size(prepared):
    train, held_out = str(prepared / "train"), str(prepared / "validation")
    config = DataConfig(train=train, curriculum=[{"from_step": 60, "sources": [{"path": held_out}]}])
    coverage, draws = audit_plan(config, 64, BatchSizes(16, ((40, 2), (50, 5))), 100, seed=5)
    assert draws[:, 0].tolist() == [2] * 40 + [5] * 10 + [16] * 10 + [0] * 40
    assert draws[:, 1].tolist() == [0] * 60 + [16] * 40
    assert [item.drawn for item in coverage] == [40 * 2 + 10 * 5 + 10 * 16, 40 * 16]
    _, draws = audit_plan(config, 64, BatchSizes(70, ((1, 30),)), 2, seed=5)
    assert draws[:50, 0].sum() == 30 and draws[50:, 0].sum() == 70 and draws[:, 1].sum() == 0


def test_the_proof_can_fail(prepared, monkeypatch):
    monkeypatch.setattr("data.corpus.stream.permute", lambda index, size, keys: index // 2)
    coverage, _ = audit_plan(DataConfig(train=str(prepared / "train")), 64, BatchSizes(16), 200, seed=5)
    assert not coverage[0].exact
