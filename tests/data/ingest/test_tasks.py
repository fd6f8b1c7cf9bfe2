import json
import os
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.corpus.shards import Corpus
from data.ingest.prepare import PrepareOptions, prepare
from data.ingest.tasks import Preparation
from data.text.formats import TextFormat
from data.tokenizer.tokenizer import Tokenizer


def start(tmp_path, tokenizer_directory, **options):
    options = PrepareOptions(validation_fraction=0.2, text_format=TextFormat(text_documents="line"), **options)
    return prepare([str(tmp_path / "in")], tokenizer_directory, str(tmp_path / "out"), options, task_bytes=2000)


def write(path, texts):
    """Of the same size and time of change, whatever the texts of one length."""
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": texts}), path, compression=None, use_dictionary=False, write_statistics=False)
    else:
        path.write_text("\n".join([json.dumps({"text": text}) for text in texts] if path.suffix == ".jsonl" else texts))
    os.utime(path, (1e9, 1e9))


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("validation_fraction", [-1.0, -1e-9, 1.0, 2.0, float("nan"), float("inf")]),
        ("sampling_alpha", [-1.0, 1.1e6, 1e308, float("nan"), float("inf"), float("-inf")]),
        ("seed", [-1]),
    ],
)
def test_numbers_that_mean_nothing_are_refused(tokenizer_directory, option, values):
    tokenizer = Tokenizer.load(tokenizer_directory)
    for value in values:
        with pytest.raises(ValueError, match=re.escape(f"{option} = {value}: give a")):
            PrepareOptions(**{option: value}).check(tokenizer)
    for value in (0, 10**30) if option == "seed" else (0.0, 0.999):
        PrepareOptions(**{option: value}).check(tokenizer)


@pytest.mark.parametrize("alpha", [1e-300, 1e6])
def test_the_least_and_the_largest_alpha_lose_no_text(tmp_path, tokenizer_directory, alpha):
    texts = [f"the model reads text {number}" for number in range(20)]
    write(tmp_path / "in" / "a.txt", texts)
    start(tmp_path, tokenizer_directory, sampling_alpha=alpha)
    tokenizer, found = Tokenizer.load(tokenizer_directory), []
    for split in ("train", "validation"):
        shards = Corpus(str(tmp_path / "out" / split))
        tokens = shards.read(0, shards.tokens)
        ends = np.flatnonzero(tokens == tokenizer.end_of_text)
        found += [tokenizer.decode(tokens[a:b]) for a, b in zip([0, *(ends + 1)], ends)]
    assert sorted(found) == sorted(texts)


@pytest.mark.parametrize("deduplicate", [False, True])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_a_changed_input_is_noticed_by_its_content(tmp_path, tokenizer_directory, name, deduplicate):
    texts = [f"line {number:04d}" for number in range(500)]
    write(tmp_path / "in" / name, texts)
    write(tmp_path / "in" / f"b{name[1:]}", ["other"])
    first = start(tmp_path, tokenizer_directory, deduplicate=deduplicate)
    assert first.tasks_before == 0 < first.tasks
    again = start(tmp_path, tokenizer_directory, deduplicate=deduplicate)
    assert again.tasks_before == again.tasks == first.tasks and again.manifests == first.manifests
    size = (tmp_path / "in" / name).stat().st_size
    write(tmp_path / "in" / name, [*texts[:320], "lime 0320", *texts[321:]])
    assert (tmp_path / "in" / name).stat().st_size == size
    with pytest.raises(ValueError, match=rf"{name}' has changed since a part of .*/out' was made of it: choose another"):
        start(tmp_path, tokenizer_directory, deduplicate=deduplicate)
    write(tmp_path / "in" / name, texts)
    assert start(tmp_path, tokenizer_directory, deduplicate=deduplicate).manifests == first.manifests


def test_an_input_that_changes_between_the_passes_of_deduplication_is_noticed(tmp_path, tokenizer_directory):
    texts = [f"line {number:04d}" for number in range(500)]
    write(tmp_path / "in" / "a.txt", texts)
    start(tmp_path, tokenizer_directory, deduplicate=True)
    for record in (tmp_path / "out" / "tasks").glob("*.json"):
        record.unlink()
    for changed in (["lime 0000", *texts[1:]], [*texts[:-1], "long\n0499"], ["line\n0000", *texts[1:]]):
        write(tmp_path / "in" / "a.txt", changed)
        with pytest.raises(ValueError, match=r"a\.txt' has changed since"):
            start(tmp_path, tokenizer_directory, deduplicate=True)


@pytest.mark.parametrize("damage", ["gone", "cut", "one bit"])
def test_a_shard_that_is_gone_is_made_again(tmp_path, tokenizer_directory, damage):
    write(tmp_path / "in" / "a.txt", [f"line {number:04d}" for number in range(500)])
    first = start(tmp_path, tokenizer_directory)
    shard = tmp_path / "out" / "train" / "shard-000001.arrow"
    content = shard.read_bytes()
    flipped = content[:200] + bytes([content[200] ^ 1]) + content[201:]
    shard.unlink() if damage == "gone" else shard.write_bytes({"cut": content[:-1], "one bit": flipped}[damage])
    again = start(tmp_path, tokenizer_directory)
    assert again.tasks_before == first.tasks - 1 and again.manifests == first.manifests and shard.read_bytes() == content


def test_records_without_digests_are_those_of_an_earlier_version(tmp_path, tokenizer_directory):
    write(tmp_path / "in" / "a.txt", [f"line {number:04d}" for number in range(500)])
    first = start(tmp_path, tokenizer_directory)
    for path in (tmp_path / "out" / "tasks").glob("*.json"):
        path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "texts"}))
    assert start(tmp_path, tokenizer_directory).manifests == first.manifests


def test_the_settings_of_a_plan_are_those_of_earlier_versions():
    record = Preparation("tokenizer", "f", "out", PrepareOptions()).record()
    assert list(record) == [
        "tokenizer", "tokenizer_fingerprint", "output", "reading", "validation_fraction", "deduplicate", "sampling_alpha",
        "seed",
    ]  # fmt: skip
