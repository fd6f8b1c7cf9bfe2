"""The manifest as bytes on disk: a promise to every later version."""

import json
import zlib

import pytest

from trainer.checkpoint.manifest import (
    CheckpointManifest,
    CheckpointMeta,
    StoredRectangle,
    TensorFile,
    decode_manifest,
    encode_manifest,
    merge_files,
)
from trainer.checkpoint.rectangles import Rectangle

META = CheckpointMeta(step=7, tokens=700, config={"run": {"seed": 1}}, extra={"batch": 7})
ON_DISK = b"""{
"format": "tiglon checkpoint",
"version": 1,
"step": 7,
"tokens": 700,
"config": {
 "run": {
  "seed": 1
 }
},
"fingerprints": {},
"versions": {},
"world": {},
"extra": {
 "batch": 7
},
"chunk_bytes": 4194304,
"tensors": {
"weight/a": {"shape":[4,2],"dtype":"F32"},
"weight/b": {"shape":[3],"dtype":"BF16"}
},
"files": {
"rank-00000.safetensors": {"bytes":200,"header_crc32":11, "rectangles": [
["weight/a",[0,0],[2,2],128,[1]],
["weight/b",[0],[3],144,[2]]
]},
"rank-00001.safetensors": {"bytes":180,"header_crc32":12, "rectangles": [
["weight/a",[2,0],[2,2],128,[3,4]]
]}
},
"crc32": """


def _file(size: int, header_crc32: int, *stored: StoredRectangle) -> TensorFile:
    dtypes = {item.tensor: "F32" if item.tensor == "weight/a" else "BF16" for item in stored}
    shapes: dict[str, tuple[int, ...]] = {item.tensor: (4, 2) if item.tensor == "weight/a" else (3,) for item in stored}
    return TensorFile(size, header_crc32, stored, dtypes, shapes)


FILES = {
    "rank-00000.safetensors": _file(
        200,
        11,
        StoredRectangle("weight/a", Rectangle((0, 0), (2, 2)), 128, (1,)),
        StoredRectangle("weight/b", Rectangle((0,), (3,)), 144, (2,)),
    ),
    "rank-00001.safetensors": _file(180, 12, StoredRectangle("weight/a", Rectangle((2, 0), (2, 2)), 128, (3, 4))),
}


def _on_disk(content: bytes = ON_DISK) -> bytes:
    body = content[: content.rindex(b'"crc32"')]
    return body + b'"crc32": ' + str(zlib.crc32(body)).encode() + b"\n}\n"


def test_the_bytes_are_those_of_every_version() -> None:
    assert encode_manifest(merge_files(META, FILES)) == _on_disk()


def test_what_was_written_is_read() -> None:
    assert json.loads(_on_disk())["tensors"]["weight/b"] == {"shape": [3], "dtype": "BF16"}
    manifest = decode_manifest(_on_disk(), "here")
    assert manifest == CheckpointManifest(
        META, {"weight/a": (4, 2), "weight/b": (3,)}, {"weight/a": "F32", "weight/b": "BF16"}, FILES
    )


def test_files_that_do_not_make_up_their_tensors_are_refused() -> None:
    first, second = FILES.values()
    with pytest.raises(ValueError, match="the ranks hold 4 elements of weight/a, which has 8: not saved"):
        merge_files(META, {"one": first})
    other = TensorFile(second.bytes, second.header_crc32, second.stored, {"weight/a": "F16"}, second.shapes)
    with pytest.raises(ValueError, match=r"two holds weight/a as F16 \(4, 2\), another rank as F32 \(4, 2\)"):
        merge_files(META, {"one": first, "two": other})


@pytest.mark.parametrize(
    "content, sentence",
    [
        (_on_disk()[:-30], "x is damaged: it is not a complete manifest"),
        (b'{"format": "another", "version": 1, "crc32": 0}', "x is not the manifest of a tiglon checkpoint"),
        (_on_disk(ON_DISK.replace(b'"version": 1', b'"version": 2')), "x has format version 2, this tiglon reads up to 1"),
        (_on_disk().replace(b"700", b"701"), "x is damaged: its checksum does not match"),
    ],
)
def test_what_is_not_a_manifest_is_one_sentence(content: bytes, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        decode_manifest(content, "x")
