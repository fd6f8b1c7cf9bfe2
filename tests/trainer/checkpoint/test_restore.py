"""Reading a checkpoint back into shards."""

from pathlib import Path

import pytest
import torch

from data.storage import open_store
from launch.checkpoints import load_checkpoint, read_checkpoint_manifest, read_meta, read_tensor
from tests.trainer.layouts import KINDS, emptied, shards, truth
from trainer.checkpoint.api import Checkpoints
from trainer.checkpoint.format import tensors_to_write, write_tensors
from trainer.checkpoint.manifest import CheckpointMeta, encode_manifest, merge_files
from trainer.checkpoint.restore import CheckpointReader
from trainer.config import CheckpointConfig


def _saved(folder: Path, full: dict[str, torch.Tensor]) -> str:
    """A checkpoint of these tensors."""
    checkpoints = Checkpoints(open_store, folder, CheckpointConfig(), None, lambda text: None)
    checkpoints.save(shards(full, (0, 1), (0, 1), True), CheckpointMeta(100, 12345))
    checkpoints.close()
    return str(folder / "step-00000100")


def test_numbers_convert_between_formats(tmp_path: Path) -> None:
    path = _saved(tmp_path, truth())
    got = emptied(shards(truth(dtype=torch.bfloat16), (0, 1), (0, 1), True))
    load_checkpoint(path, got)
    assert all(torch.equal(shard.values, truth()[shard.name].reshape(-1).bfloat16()) for shard in got)
    path = _saved(tmp_path / "low", truth(dtype=torch.bfloat16))
    got = emptied(shards(truth(), (1, 2), (0, 1), True))
    load_checkpoint(path, got)
    want = shards(truth(dtype=torch.bfloat16), (1, 2), (0, 1), True)
    assert all(torch.equal(a.values, b.values.float()) for a, b in zip(got, want))


def test_only_some_names_are_filled(tmp_path: Path) -> None:
    path = _saved(tmp_path, truth())
    got = emptied(shards(truth(), (0, 1), (0, 1), True))
    load_checkpoint(path, got, only=lambda name: name.startswith("weight/"))
    for shard in got:
        want = truth()[shard.name].reshape(-1) if shard.name.startswith("weight/") else torch.full_like(shard.values, -7)
        assert torch.equal(shard.values, want)


def test_what_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    path = _saved(tmp_path, truth(kinds=KINDS[:2]))
    with pytest.raises(ValueError, match=r"no second_moment/.*reset_optimizer"):
        load_checkpoint(path, shards(truth(), (0, 1), (0, 1), True))
    wrong = shards(truth(kinds=KINDS[:1]), (0, 1), (0, 1), True)
    wrong[0].shape = wrong[0].slice_shape = (17, 24)
    with pytest.raises(ValueError, match=r"shape \(34, 12\), this run wants \(17, 24\)"):
        load_checkpoint(path, wrong)
    with pytest.raises(ValueError, match="no tensor weight/x"):
        read_tensor(path, "weight/x")
    with pytest.raises(FileNotFoundError, match="is not a checkpoint"):
        read_meta(tmp_path)


def test_a_manifest_that_is_handed_in_is_not_read_again(tmp_path: Path) -> None:
    path = _saved(tmp_path, truth())
    manifest = read_checkpoint_manifest(path)
    (Path(path) / "manifest.json").unlink()
    reader = CheckpointReader(open_store(path), manifest)
    assert reader.tensors() == {name: (tuple(value.shape), torch.float32) for name, value in truth().items()}
    for name, value in truth().items():
        assert torch.equal(reader.tensor(name), value)


def test_ranks_share_the_files_that_they_verify(tmp_path: Path) -> None:
    """Of two files each of two ranks checks one."""
    tensors = [tensors_to_write(shards(truth(), (0, 1), (rank, 2), True)) for rank in (0, 1)]
    store = open_store(str(tmp_path))
    files = {f"rank-{rank}": write_tensors(store, f"rank-{rank}", tensors[rank]) for rank in (0, 1)}
    store.write("manifest.json", encode_manifest(merge_files(CheckpointMeta(1, 1), files)))
    beats: list[None] = []
    for rank in (0, 1):
        CheckpointReader(store).verify((rank, 2), lambda: beats.append(None))
    assert beats
    store.write("rank-1", b"")
    CheckpointReader(store).verify((0, 2))
    with pytest.raises(ValueError, match="rank-1 has 0 bytes"):
        CheckpointReader(store).verify((1, 2))
