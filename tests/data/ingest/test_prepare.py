import json
import multiprocessing
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.corpus.shards import Corpus, read_corpus_manifest
from data.ingest.prepare import PrepareOptions, prepare
from data.text.formats import TextFormat
from data.tokenizer.tokenizer import Tokenizer


def texts(directory, tokenizer):
    """The documents of a part, read by plain pyarrow."""
    found = []
    for shard in sorted(Path(directory).glob("*.arrow")):
        table = pa.ipc.open_file(pa.memory_map(str(shard))).read_all()
        for row in range(table.num_rows):
            tokens = table["tokens"][row].values.to_numpy()
            assert tokens[-1] == tokenizer.end_of_text
            found.append(tokenizer.decode(tokens[:-1]))
    return found


def contents(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in Path(directory).rglob("*") if path.is_file()}


def test_every_document_lands_once(tmp_path, corpus_jsonl, documents, tokenizer_directory):
    tokenizer = Tokenizer.load(tokenizer_directory)
    prepare([corpus_jsonl], tokenizer_directory, str(tmp_path), PrepareOptions(validation_fraction=0.2), task_bytes=20_000)
    train, held_out = texts(tmp_path / "train", tokenizer), texts(tmp_path / "validation", tokenizer)
    assert sorted(train + held_out) == sorted(documents)
    assert 0.1 < len(held_out) / len(documents) < 0.3
    manifest = read_corpus_manifest(str(tmp_path / "train"))
    assert manifest.counts["documents"] == len(documents)
    assert manifest.counts["bytes"] == sum(len(text.encode()) for text in documents)
    assert sum(shard.documents for shard in manifest.shards) == len(train)
    assert manifest.dtype == "uint16" and manifest.tokenizer == tokenizer.fingerprint
    corpus = Corpus(str(tmp_path / "train"))
    joined = np.concatenate([[*tokenizer.encode(text), tokenizer.end_of_text] for text in train])
    assert np.array_equal(corpus.read(0, corpus.tokens), joined)
    assert np.array_equal(corpus.read(5, corpus.tokens - 7), joined[5:-7])
    assert corpus.read(0, 10).base is not None, "a view of the map, not a copy"


def test_workers_change_no_byte(tmp_path, corpus_jsonl, tokenizer_directory):
    for workers in (1, 2):
        prepare([corpus_jsonl], tokenizer_directory, str(tmp_path / str(workers)), workers=workers, task_bytes=50_000)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_every_format_gives_the_same_documents(tmp_path, documents, tokenizer_directory):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents).encode()
    (tmp_path / "in").mkdir()
    for codec, ending in (("gzip", "gz"), ("zstd", "zst")):
        with pa.CompressedOutputStream(str(tmp_path / "in" / f"x.jsonl.{ending}"), codec) as file:
            file.write(lines)
    pq.write_table(pa.table({"text": documents}), tmp_path / "in" / "x.parquet", row_group_size=50)
    pq.write_table(
        pa.table({"n": [1] * len(documents), "text": pa.array(documents, pa.large_string())}), tmp_path / "in" / "y.parquet"
    )
    pq.write_table(pa.table({"text": pa.array([t.encode() for t in documents])}), tmp_path / "in" / "z.parquet")
    pq.write_table(pa.table({"text": pa.array(documents).dictionary_encode()}), tmp_path / "in" / "d.parquet")
    (tmp_path / "in" / "many").mkdir()
    for number, text in enumerate(documents):
        (tmp_path / "in" / "many" / f"{number:05d}.txt").write_bytes(text.encode())
    manifests = []
    for name in ("x.jsonl.gz", "x.jsonl.zst", "x.parquet", "y.parquet", "z.parquet", "d.parquet", "many", "man*/*.txt"):
        output = tmp_path / "out" / re.sub(r"\W", "", name)
        prepare([str(tmp_path / "in" / name)], tokenizer_directory, str(output), task_bytes=1 << 30)
        manifests.append(read_corpus_manifest(str(output / "train")).fingerprint)
    assert len(set(manifests)) == 1


@pytest.mark.parametrize("task_bytes", [64, 1000, 1 << 20])
def test_line_and_paragraph_documents(tmp_path, tokenizer_directory, task_bytes):
    (tmp_path / "x.txt").write_bytes("one\r\n\n\ntwo 你\nthree\n\n \nfour".encode() + b"\n" + b"long " * 100)
    tokenizer = Tokenizer.load(tokenizer_directory)
    wanted = {
        "line": ["one", "two 你", "three", " ", "four", "long " * 100],
        "paragraph": ["one", "two 你\nthree", "four\n" + "long " * 100],
    }
    for kind, expected in wanted.items():
        output, reading = tmp_path / kind, TextFormat(text_documents=kind)
        prepare(
            [str(tmp_path / "x.txt")],
            tokenizer_directory,
            str(output),
            PrepareOptions(validation_fraction=0, text_format=reading),
            task_bytes=task_bytes,
            workers=1,
        )
        assert texts(output / "train", tokenizer) == expected
        assert not (output / "validation").exists()


def test_a_second_run_does_nothing_and_another_plan_is_refused(tmp_path, corpus_jsonl, tokenizer_directory):
    progress = []
    prepare([corpus_jsonl], tokenizer_directory, str(tmp_path), task_bytes=50_000, progress=progress.append)
    before, tasks = contents(tmp_path), len(progress)
    assert tasks > 3 and progress[-1].done_bytes == progress[-1].bytes == Path(corpus_jsonl).stat().st_size
    assert progress[-1].remaining_seconds == 0 < progress[0].remaining_seconds
    prepare([corpus_jsonl], tokenizer_directory, str(tmp_path), task_bytes=50_000, progress=progress.append)
    assert len(progress) == tasks and contents(tmp_path) == before
    with pytest.raises(ValueError, match=r"with other settings or tokenizer .* choose another --output"):
        prepare([corpus_jsonl], tokenizer_directory, str(tmp_path), PrepareOptions(validation_fraction=0.5), task_bytes=50_000)
    with pytest.raises(ValueError, match=r"of other files, sizes of files or --task-bytes .* choose another --output"):
        prepare([corpus_jsonl], tokenizer_directory, str(tmp_path), task_bytes=40_000)


def test_a_preparation_that_finished_nothing_may_be_corrected(tmp_path, corpus_jsonl, tokenizer_directory):
    """A line that cannot be read ends the command; whoever repairs it, or leaves it out, need not choose another output."""
    (tmp_path / "x.jsonl").write_text('{"text": "one"}\n{"text": "one"}\n{"tex\n')
    for options in (PrepareOptions(0), PrepareOptions(0, deduplicate=True)):
        with pytest.raises(ValueError, match="broken JSON"):
            prepare([str(tmp_path / "x.jsonl")], tokenizer_directory, str(tmp_path / "out"), options)
    (tmp_path / "x.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n{"text": "one"}\n')
    options = PrepareOptions(0, deduplicate=True)
    prepared = prepare([str(tmp_path / "x.jsonl")], tokenizer_directory, str(tmp_path / "out"), options)
    assert prepared.manifests["train"].counts["documents"] == 2 and prepared.manifests["train"].counts["duplicates"] == 1


def test_a_killed_worker_is_told_and_nothing_is_lost(tmp_path, corpus_jsonl, tokenizer_directory):
    def kill(progress):
        for child in multiprocessing.active_children():
            child.kill()

    arguments = {"inputs": [corpus_jsonl], "tokenizer_directory": tokenizer_directory, "task_bytes": 5000}
    with pytest.raises(ValueError, match="fewer --workers"):
        prepare(**arguments, output=str(tmp_path / "a"), workers=2, progress=kill)
    for output in ("a", "b"):
        prepare(**arguments, output=str(tmp_path / output))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
