import hashlib
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from data.ingest import deduplicate
from data.ingest.prepare import PrepareOptions, prepare
from data.text.formats import TextFormat
from data.text.sources import plan_tasks
from data.tokenizer.tokenizer import Tokenizer
from tests.data.ingest.test_prepare import contents, texts


def test_duplicates_keep_the_first(tmp_path, documents, tokenizer_directory):
    tokenizer = Tokenizer.load(tokenizer_directory)
    repeated = documents[:40] + documents[10:30] + documents[:5] + ["last"]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in repeated))
    for workers in (1, 2):
        output = tmp_path / f"out{workers}"
        prepared = prepare(
            [str(tmp_path / "x.jsonl")],
            tokenizer_directory,
            str(output),
            PrepareOptions(validation_fraction=0, deduplicate=True),
            task_bytes=9000,
            workers=workers,
        )
        assert texts(output / "train", tokenizer) == [*documents[:40], "last"]
        assert prepared.manifests["train"].counts["duplicates"] == 25
    assert contents(tmp_path / "out1") == contents(tmp_path / "out2")


def test_copies_are_never_on_both_sides(tmp_path, documents, tokenizer_directory):
    tokenizer = Tokenizer.load(tokenizer_directory)
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents[:50] * 2))
    prepare(
        [str(tmp_path / "x.jsonl")],
        tokenizer_directory,
        str(tmp_path),
        PrepareOptions(validation_fraction=0.5),
        task_bytes=5000,
    )
    sides = [set(texts(tmp_path / part, tokenizer)) for part in ("train", "validation")]
    assert not sides[0] & sides[1] and all(sides)


def test_masks_are_those_of_a_set_whatever_the_slices(tmp_path, monkeypatch):
    texts = [f"text {n % 7}" for n in range(40)]
    tasks = []
    for number in range(4):
        path = tmp_path / f"{number}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[number * 10 :][:10]))
        tasks += plan_tasks([str(path)], TextFormat())
    seen: set[str] = set()
    wanted = [not (text in seen or seen.add(text)) for text in texts]
    for slice_documents in (1 << 20, 9):
        monkeypatch.setattr(deduplicate, "SLICE_DOCUMENTS", slice_documents)
        folder = tmp_path / f"keys-{slice_documents}"
        with ThreadPoolExecutor(1) as executor:
            deduplicate.keep_masks(executor, tasks, TextFormat(), str(folder))
        masks = [np.frombuffer((folder / f"keep-{n:06d}.bin").read_bytes(), bool) for n in range(4)]
        assert np.concatenate(masks).tolist() == wanted


def test_a_key_is_of_the_utf_8():
    assert deduplicate.text_key("å") == hashlib.blake2b("å".encode(), digest_size=16).digest() != deduplicate.text_key("a")
