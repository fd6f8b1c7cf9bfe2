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


def write_lines(path, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


STRANGERS = {
    "keys": ["keys/id_rsa"],
    "a corpus that was imported": ["train/manifest.json", "train/shard-000000.arrow"],
    "a dataset": ["train/0.jsonl", "validation/0.jsonl"],
    "tasks": ["tasks/todo.txt"],
    "another plan": ["plan.json"],
    "a plan of others with tasks": ["plan.json", "tasks/task-000000.json"],
}


@pytest.mark.parametrize("name", STRANGERS)
def test_what_others_have_in_the_output_is_never_touched(tmp_path, tokenizer_directory, name):
    inputs = [write_lines(tmp_path / "in.jsonl", ["one", "two"])]
    for file in STRANGERS[name]:
        (tmp_path / "out" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / file).write_text('{"a": 1}')
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match=r"out' holds .*, but no preparation of ours: choose another --output"):
        prepare(inputs, tokenizer_directory, str(tmp_path / "out"))
    assert contents(tmp_path / "out") == before


def test_a_directory_with_other_things_may_get_a_corpus(tmp_path, tokenizer_directory):
    inputs = [write_lines(tmp_path / "books" / "in.jsonl", ["one", "two"])]
    for stranger in ("dl/film.partial", "x.partial/y", "notes.md"):
        (tmp_path / stranger).parent.mkdir(exist_ok=True)
        (tmp_path / stranger).write_text("kept")
    before = contents(tmp_path)
    for _ in range(2):
        prepare(inputs, tokenizer_directory, str(tmp_path), PrepareOptions(0))
    after = contents(tmp_path)
    assert {name: after[name] for name in before} == before
    assert {name.split("/")[0] for name in after.keys() - before.keys()} == {"plan.json", "tasks", "train"}


@pytest.mark.parametrize("spelled", ["{folder}/out", "file://{folder}/out", "{folder}/in/../in/out"])
def test_an_output_inside_its_input_is_refused_however_it_is_spelled(tmp_path, tokenizer_directory, spelled, monkeypatch):
    write_lines(tmp_path / "in" / "a.jsonl", ["one"])
    monkeypatch.setenv("HOME", str(tmp_path))
    for given in ("~/in", str(tmp_path / "in"), f"file://{tmp_path}/in"):
        for output in (spelled.format(folder=tmp_path / "in"), "~/in/out"):
            with pytest.raises(ValueError, match="lies in the input"):
                prepare([given], tokenizer_directory, output)


def test_of_two_preparations_at_once_one_is_refused(tmp_path, tokenizer_directory):
    one, two = (write_lines(tmp_path / f"{name}.jsonl", [name] * 20) for name in ("one", "two"))
    refused = []

    def other(progress):
        if not refused:
            for inputs in ([two], [one]):
                with pytest.raises(ValueError, match="is being written by another command"):
                    prepare(inputs, tokenizer_directory, str(tmp_path / "out"))
                refused.append(inputs)

    prepare([one], tokenizer_directory, str(tmp_path / "out"), PrepareOptions(0), progress=other)
    assert texts(tmp_path / "out" / "train", Tokenizer.load(tokenizer_directory)) == ["one"] * 20 and len(refused) == 2
    assert not list((tmp_path / "out").glob(".*"))


def test_an_input_that_is_written_to_while_it_is_read(tmp_path, tokenizer_directory):
    for change in ("grows", "shrinks", "goes", "another comes"):
        path = tmp_path / change / "a.jsonl"
        write_lines(path, ["one"] * 50)

        def disturb(progress, change=change, path=path):
            match change:
                case "grows":
                    path.write_text(path.read_text() + '{"text": "more"}\n')
                case "shrinks":
                    path.write_text('{"text": "one"}\n')
                case "another comes":
                    write_lines(path.with_name("b.jsonl"), ["two"])
                case "goes":
                    path.rename(path.with_suffix(".json"))

        with pytest.raises(ValueError, match=r"/[ab]\.json.*' changed while it was read: let nothing write to the input"):
            prepare([str(path.parent)], tokenizer_directory, str(tmp_path / "out" / change), progress=disturb)
        assert not (tmp_path / "out" / change / "train" / "manifest.json").exists()


@pytest.mark.parametrize("deduplicate", [False, True])
def test_what_stopped_may_go_on_without_the_broken_documents(tmp_path, tokenizer_directory, deduplicate):
    """As the sentence says: what is finished left nothing out. The other way round it may have."""
    numbers = [f"{number:05d}" for number in range(300)]
    broken = write_lines(tmp_path / "in.jsonl", numbers)
    (tmp_path / "in.jsonl").write_text((tmp_path / "in.jsonl").read_text() + "{no json\n")
    first = [PrepareOptions(0, TextFormat(on_error=act), deduplicate=deduplicate) for act in ("stop", "skip")]
    with pytest.raises(ValueError, match="--on-error skip"):
        prepare([broken], tokenizer_directory, str(tmp_path / "out"), first[0], task_bytes=1000)
    prepared = prepare([broken], tokenizer_directory, str(tmp_path / "out"), first[1], task_bytes=1000)
    assert (prepared.tasks_before > 0) is not deduplicate  # whose keys come before all tasks
    assert texts(tmp_path / "out" / "train", Tokenizer.load(tokenizer_directory)) == numbers
    assert prepared.manifests["train"].counts["left_out"] == {"broken JSON": 1}
    with pytest.raises(ValueError, match="with other settings"):
        prepare([broken], tokenizer_directory, str(tmp_path / "out"), first[0], task_bytes=1000)


def test_a_wrong_field_under_skip_may_be_corrected(tmp_path, tokenizer_directory):
    inputs, wrong = [write_lines(tmp_path / "in.jsonl", ["one", "two"])], TextFormat(field="content", on_error="skip")
    with pytest.raises(ValueError, match="no document to prepare"):
        prepare(inputs, tokenizer_directory, str(tmp_path / "out"), PrepareOptions(0, wrong))
    prepare(inputs, tokenizer_directory, str(tmp_path / "out"), PrepareOptions(0))
    assert texts(tmp_path / "out" / "train", Tokenizer.load(tokenizer_directory)) == ["one", "two"]
