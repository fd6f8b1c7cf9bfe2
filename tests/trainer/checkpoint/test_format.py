"""One rank's file: plain safetensors, checked chunk by chunk when it is read."""

import zlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save

from data.storage import open_store
from trainer.checkpoint import format
from trainer.checkpoint.format import (
    ChunkRead,
    StagedTensor,
    check_file,
    checksum_chunks,
    read_chunks,
    read_tensors,
    safetensors_header,
    tensors_to_write,
    verify_file,
    write_tensors,
)
from trainer.checkpoint.manifest import CheckpointManifest, CheckpointMeta, merge_files
from trainer.checkpoint.rectangles import Rectangle, Shard

FULL = torch.arange(48.0).view(6, 8)


def _shard(values: torch.Tensor, name: str = "w") -> Shard:
    return Shard(name, tuple(values.shape), tuple(values.shape), (0,) * values.dim(), 0, values.reshape(-1))


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CheckpointManifest:
    """FULL as the one tensor of a checkpoint, with a checksum for each two rows."""
    monkeypatch.setattr(format, "CHUNK_BYTES", 64)
    file = write_tensors(open_store(str(tmp_path)), "file", tensors_to_write([_shard(FULL)]))
    manifest = merge_files(CheckpointMeta(1, 1), {"file": file})
    return CheckpointManifest(manifest.meta, manifest.shapes, manifest.dtypes, manifest.files, 64)


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    values = {"a": FULL, "b": torch.tensor([1, -2], dtype=torch.int64), "c": torch.ones(3, dtype=torch.bfloat16)}
    file = write_tensors(open_store(str(tmp_path)), "x", tensors_to_write([_shard(v, name) for name, v in values.items()]))
    assert file.bytes == (tmp_path / "x").stat().st_size
    with safe_open(tmp_path / "x", framework="pt") as opened:
        found = {name.partition("[")[0]: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no dict
    assert all(torch.equal(found[name], value) for name, value in values.items()) and found.keys() == values.keys()
    assert [stored.tensor for stored in file.stored] == ["b", "a", "c"], "wide dtypes first, so that all stay aligned"


def test_the_header_says_what_that_of_the_library_says() -> None:
    ours = safetensors_header([("a", "F32", (6, 8)), ("b", "BF16", (3,))])
    theirs = save({"a": FULL, "b": torch.ones(3, dtype=torch.bfloat16)})
    size = int.from_bytes(ours[:8], "little")
    assert len(ours) == 8 + size and len(ours) % 64 == 0
    assert b'"a":{"dtype":"F32","shape":[6,8],"data_offsets":[0,192]}' in ours and b'"data_offsets":[0,192]' in theirs
    assert b'"b":{"dtype":"BF16","shape":[3],"data_offsets":[192,198]}' in ours and b'"data_offsets":[192,198]' in theirs


def test_a_dtype_that_a_checkpoint_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^w is torch.complex64; a checkpoint holds torch.float64, "):
        tensors_to_write([_shard(torch.zeros(2, dtype=torch.complex64))])


def test_chunks_are_rows_one_behind_another() -> None:
    chunks = list(checksum_chunks(Rectangle((1, 0), (5, 8)), 4, 64))
    assert chunks == [
        (Rectangle((1, 0), (2, 8)), 0, 64),
        (Rectangle((3, 0), (2, 8)), 64, 64),
        (Rectangle((5, 0), (1, 8)), 128, 32),
    ]


def test_only_the_chunks_that_are_wanted_are_read(tmp_path: Path, written: CheckpointManifest) -> None:
    store = open_store(str(tmp_path))
    content = bytearray((tmp_path / "file").read_bytes())
    content[-1] ^= 1  # of the last two rows
    (tmp_path / "file").write_bytes(content)
    values = torch.zeros(6)
    wanted = {"w": [(Rectangle((0, 1), (2, 3)), values)]}
    assert read_tensors(store, "file", written, wanted) == 6
    assert torch.equal(values.view(2, 3), FULL[:2, 1:4])
    low = torch.zeros(16, dtype=torch.bfloat16)
    assert read_tensors(store, "file", written, {"w": [(Rectangle((1, 0), (2, 8)), low)]}) == 16
    assert torch.equal(low.view(2, 8), FULL[1:3].bfloat16())
    assert read_tensors(store, "file", written, {"other": [(Rectangle((0,), (1,)), values)]}) == 0
    with pytest.raises(ValueError, match=r"file is damaged: the checksum of bytes \d+ to \d+ does not match"):
        read_tensors(store, "file", written, {"w": [(Rectangle((5, 0), (1, 6)), values)]})
    with pytest.raises(ValueError, match="is damaged"):
        verify_file(store, "file", written)


def test_every_byte_of_a_file_is_verified(tmp_path: Path, written: CheckpointManifest) -> None:
    store, content = open_store(str(tmp_path)), (tmp_path / "file").read_bytes()
    verify_file(store, "file", written)
    for at in range(0, len(content), 7):
        (tmp_path / "file").write_bytes(content[:at] + bytes([content[at] ^ 8]) + content[at + 1 :])
        with pytest.raises(ValueError, match="is damaged"):
            verify_file(store, "file", written)


def test_a_file_of_another_length_is_one_sentence(tmp_path: Path, written: CheckpointManifest) -> None:
    store, file = open_store(str(tmp_path)), written.files["file"]
    check_file(store, "file", "it", file)
    with pytest.raises(ValueError, match=r"^it is missing$"):
        check_file(store, "nothing", "it", file)
    (tmp_path / "file").write_bytes(b"short")
    with pytest.raises(ValueError, match=rf"^it has 5 bytes, its manifest says {file.bytes}$"):
        check_file(store, "file", "it", file)


def test_no_more_chunks_are_in_memory_than_twice_the_readers() -> None:
    class Source:
        """Counts what was read and not yet checked."""

        open, most = 0, 0

        def read_into(self, offset: int, buffer: memoryview) -> int:
            self.open += 1
            self.most = max(self.most, self.open)
            buffer[:] = bytes(len(buffer))
            return len(buffer)

        def close(self) -> None: ...

    source = Source()

    def use(buffer: torch.Tensor) -> None:
        source.open -= 1

    beats: list[int] = []
    chunks = [ChunkRead(number * 8, 8, zlib.crc32(bytes(8)), use=use) for number in range(50)]
    read_chunks(source, "it", chunks, 2, lambda: beats.append(1))
    assert source.most <= 4 and len(beats) == 50
    with pytest.raises(ValueError, match="it is damaged: the checksum of bytes 16 to 24 does not match"):
        read_chunks(source, "it", [*chunks[:2], ChunkRead(16, 8, 1)], 2)


def test_a_staged_tensor_knows_its_bytes() -> None:
    assert StagedTensor("w", (3,), Rectangle((0,), (3,)), torch.zeros(3, dtype=torch.bfloat16)).nbytes == 6
