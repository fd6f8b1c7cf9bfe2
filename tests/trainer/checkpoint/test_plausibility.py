"""Manifests of strangers: whole by their checksum, and meant to lead a reader elsewhere."""

import json
import resource
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data.storage import open_store
from trainer.checkpoint.format import StagedTensor, write_tensors
from trainer.checkpoint.manifest import FILE, CheckpointMeta, encode_manifest, merge_files
from trainer.checkpoint.plausibility import MAX_MANIFEST_BYTES
from trainer.checkpoint.rectangles import Rectangle
from trainer.checkpoint.restore import CheckpointReader

HUGE = 1 << 50
DATA = "rank-00000.safetensors"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A sound checkpoint of two tensors, beside a file that it must not name."""
    directory = tmp_path / "outer/step-00000001"
    directory.mkdir(parents=True)
    tensors = [
        StagedTensor("weight/a", (4, 2), Rectangle((0, 0), (4, 2)), torch.arange(8.0)),
        StagedTensor("weight/b", (3,), Rectangle((0,), (3,)), torch.arange(3.0)),
    ]
    store = open_store(str(directory))
    file = write_tensors(store, DATA, tensors)
    (tmp_path / "outer/secret").write_bytes((directory / DATA).read_bytes())
    store.write(FILE, encode_manifest(merge_files(CheckpointMeta(1, 10, extra={"lineage": {"id": "abc"}}), {DATA: file})))
    return directory


def reseal(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest and give it a checksum that matches, as a stranger can."""
    tree = json.loads((directory / FILE).read_bytes())
    del tree["crc32"]
    change(tree)
    write_sealed(directory, json.dumps(tree)[:-1])


def write_sealed(directory: Path, body: str) -> None:
    text = body + ", "
    (directory / FILE).write_text(f'{text}"crc32": {zlib.crc32(text.encode())}}}')


def rename(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda tree: tree["files"].__setitem__(name, tree["files"].pop(DATA))


def put(*path: Any) -> Callable[[dict[str, Any]], None]:
    """Set the value at a path of keys; the last argument is the value."""
    *keys, last, value = path

    def change(tree: Any) -> None:
        for key in keys:
            tree = tree[key]
        tree[last] = value

    return change


def together(*changes: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], None]:
    def change(tree: dict[str, Any]) -> None:
        for one in changes:
            one(tree)

    return change


NAMES = ("../secret", "/etc/passwd", "a/../../secret", "..", ".", "", "a\0b", "a/b", "x\x1b[31m", "..\\secret", "~", "é")
ROWS = ("files", DATA, "rectangles")
CHANGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    **{
        f"file {name!r}": (rename(name), "names a file")
        for name in (
            "../secret",
            "/etc/passwd",
            "a/../../secret",
            "..",
            ".",
            "",
            "a\0b",
            "a/b",
            "x\x1b[31m",
            "..\\secret",
            "~",
            "é",
        )
    },
    "negative shape": (put("tensors", "weight/a", "shape", [-4, -2]), "has shape"),
    "float shape": (put("tensors", "weight/a", "shape", [4.0, 2]), "has shape"),
    "true in a shape": (put("tensors", "weight/a", "shape", [True, 8]), "has shape"),
    "text in a shape": (put("tensors", "weight/a", "shape", "42"), "has shape"),
    "a shape that is no list": (put("tensors", "weight/a", "shape", 8), "not laid out"),
    "a hundred thousand dimensions": (put("tensors", "weight/a", "shape", [1] * 100_000), "has shape"),
    "huge shape": (put("tensors", "weight/a", "shape", [HUGE, 2]), "elements of 'weight/a'"),
    "huge shape and rectangle": (
        together(put("tensors", "weight/a", "shape", [HUGE, 2]), put(*ROWS, 0, 2, [HUGE, 2])),
        "holds two tensors at byte",
    ),
    "huge numbers": (put("tensors", "weight/a", "shape", [1 << 64, 1 << 64]), "has shape"),
    "dtype": (put("tensors", "weight/a", "dtype", "O"), "has dtype 'O'"),
    "dtype that is no text": (put("tensors", "weight/a", "dtype", ["F32"]), "has dtype"),
    "negative offset": (put(*ROWS, 0, 3, -8), "not given in whole numbers"),
    "float offset": (put(*ROWS, 0, 3, 128.5), "not given in whole numbers"),
    "offset beyond the file": (put(*ROWS, 1, 3, HUGE), "end at byte"),
    "header of gigabytes": (
        together(put("files", DATA, "bytes", 1 << 40), put(*ROWS, 0, 3, 1 << 33), put(*ROWS, 1, 3, 1 << 34)),
        "the header of",
    ),
    "overlapping bytes": (lambda tree: put(*ROWS, 1, 3, tree["files"][DATA]["rectangles"][0][3])(tree), "two tensors at byte"),
    "rectangle outside": (put(*ROWS, 0, 1, [2, 0]), "outside its shape"),
    "rectangle of other dimensions": (put(*ROWS, 0, 2, [8]), "outside its shape"),
    "unknown tensor": (put(*ROWS, 0, 0, "weight/x"), "not laid out"),
    "a row too short": (put(*ROWS, 0, [1]), "not laid out"),
    "chunks of nothing": (put("chunk_bytes", 0), "chunk_bytes is 0"),
    "huge chunks": (put("chunk_bytes", HUGE), "chunk_bytes"),
    "negative size": (put("files", DATA, "bytes", -1), "bytes, wanted"),
    "step": (put("step", "../../x"), "step is"),
    "negative step": (put("step", -1), "step is -1"),
    "config": (put("config", [1]), "config is"),
    "extra": (put("extra", "x"), "extra is"),
    "files": (put("files", [1]), "not laid out"),
    "tensors": (put("tensors", None), "not laid out"),
    "lineage that leads out": (put("extra", {"lineage": {"id": "../../x"}}), "id of its lineage"),
    "absolute lineage": (put("extra", {"life": {"id": "/x"}}), "id of its lineage"),
    "lineage": (put("extra", {"lineage": [1]}), "lineage is no object"),
    "version": (put("version", "1"), "not the manifest"),
    "newer version": (put("version", 10**30), "format version"),
}


def refused(directory: Path) -> str:
    """The one sentence with which every way to read the checkpoint is refused, at the cost of little memory."""
    sentences = set()
    tracemalloc.start()
    for read in (CheckpointReader.tensors, CheckpointReader.verify, lambda reader: reader.tensor("weight/a")):
        with pytest.raises(ValueError) as error:
            read(CheckpointReader(open_store(str(directory))))
        sentences.add(str(error.value))
    assert tracemalloc.get_traced_memory()[1] < max(64 << 20, 40 * (directory / FILE).stat().st_size)
    tracemalloc.stop()
    assert len(sentences) == 1
    sentence = sentences.pop()
    assert str(directory) in sentence and "\n" not in sentence and len(sentence) < 600
    return sentence


def test_a_sound_one_is_read(checkpoint: Path) -> None:
    before = (checkpoint / FILE).read_bytes()
    reseal(checkpoint, lambda tree: None)
    assert (checkpoint / FILE).read_bytes() != before, "sealed anew"
    reader = CheckpointReader(open_store(str(checkpoint)))
    reader.verify()
    assert reader.tensor("weight/a").flatten().tolist() == list(range(8))


@pytest.mark.parametrize("case", CHANGES)
def test_what_cannot_be_is_refused(checkpoint: Path, case: str) -> None:
    change, words = CHANGES[case]
    reseal(checkpoint, change)
    listing = sorted(path.name for path in checkpoint.parent.rglob("*"))
    assert words in refused(checkpoint)
    assert sorted(path.name for path in checkpoint.parent.rglob("*")) == listing


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ('{"a": ' + "[" * 200_000, "damaged"),
        ('{"format": "tiglon checkpoint", "version": 1, "step": ' + "9" * 5000, "damaged"),
        ('{"format": "tiglon checkpoint", "version": 1, "version": 1', "damaged"),
        ('{"format": "tiglon checkpoint", "version": 1', "not laid out"),
        ("[1", "damaged"),
        ('{"format": ["x"], "version": {}', "not the manifest"),
    ],
    ids=["deep", "digits", "twice", "empty", "no JSON", "types"],
)
def test_other_json_is_refused(checkpoint: Path, body: str, words: str) -> None:
    write_sealed(checkpoint, body)
    assert words in refused(checkpoint)


def test_a_checksum_key_in_other_letters_is_refused(checkpoint: Path) -> None:
    content = (checkpoint / FILE).read_text()
    (checkpoint / FILE).write_text(content.replace('"crc32": ', '"\\u0063rc32": '))
    assert "checksum" in refused(checkpoint)


def test_a_manifest_of_gigabytes_is_not_read(checkpoint: Path) -> None:
    with open(checkpoint / FILE, "wb") as file:
        file.truncate(MAX_MANIFEST_BYTES + 1)  # takes no room on the disk
    assert "a manifest has at most" in refused(checkpoint)


def test_no_memory_is_taken_for_a_tensor_that_its_file_is_too_small_for(checkpoint: Path) -> None:
    """All numbers of the manifest agree; only the file on the disk is small."""

    def change(tree: dict[str, Any]) -> None:
        tree["tensors"] = {"weight/a": {"shape": [HUGE], "dtype": "F32"}}
        tree["files"][DATA] |= {"bytes": 4 * HUGE + 4096, "rectangles": [["weight/a", [0], [HUGE], 4096, [1]]]}

    reseal(checkpoint, change)
    reader = CheckpointReader(open_store(str(checkpoint)))
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 36, before[1]))
    try:
        with pytest.raises(ValueError, match=r"has \d+ bytes, its manifest says"):
            reader.tensor("weight/a")
        with pytest.raises(ValueError, match=r"has \d+ bytes, its manifest says"):
            reader.verify()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("checksums", [[], [1, 2]])
def test_other_counts_of_checksums_are_refused(checkpoint: Path, checksums: list[int]) -> None:
    reseal(checkpoint, put(*ROWS, 0, 4, checksums))
    reader = CheckpointReader(open_store(str(checkpoint)))
    for read in (reader.verify, lambda: reader.tensor("weight/a")):
        with pytest.raises(ValueError, match="not one checksum for each chunk of weight/a"):
            read()
