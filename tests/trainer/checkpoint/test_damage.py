"""What can go wrong with a checkpoint, each reports in one sentence, nothing lost."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from launch.checkpoints import load_checkpoint, verify_checkpoint
from tests.trainer.layouts import emptied, saved, shards, truth


def _truncate(path: Path) -> None:
    os.truncate(path / "rank-00000.safetensors", 5000)


def _flip(path: Path) -> None:
    content = bytearray((path / "rank-00000.safetensors").read_bytes())
    content[-777] ^= 4
    (path / "rank-00000.safetensors").write_bytes(content)


def _flip_header(path: Path) -> None:
    content = bytearray((path / "rank-00000.safetensors").read_bytes())
    content[20] ^= 1
    (path / "rank-00000.safetensors").write_bytes(content)


def _remove(path: Path) -> None:
    (path / "rank-00000.safetensors").unlink()


def _newer(path: Path) -> None:
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"version": 1', '"version": 99'))


def _shorten_manifest(path: Path) -> None:
    os.truncate(path / "manifest.json", 300)


def _edit_manifest(path: Path) -> None:
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"tokens": 200', '"tokens": 201'))


FAULTS: list[tuple[Callable[[Path], None], str]] = [
    (_truncate, r"rank-00000.safetensors has 5000 bytes, its manifest says \d+"),
    (_flip, r"rank-00000.safetensors is damaged: the checksum of bytes \d+ to \d+ does not match"),
    (_flip_header, r"rank-00000.safetensors is damaged: the checksum of bytes 0 to \d+ does not match"),
    (_remove, r"rank-00000.safetensors is missing"),
    (_newer, r"has format version 99, this tiglon reads up to 1: update tiglon"),
    (_shorten_manifest, r"manifest.json is damaged: it is not a complete manifest"),
    (_edit_manifest, r"manifest.json is damaged: its checksum does not match"),
]


@pytest.mark.parametrize("damage, sentence", FAULTS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_damaged_checkpoint_is_passed_over_with_its_reason(
    tmp_path: Path, damage: Callable[[Path], None], sentence: str
) -> None:
    checkpoints, reports = saved(tmp_path, 10, 20)
    damage(tmp_path / "step-00000020")
    with pytest.raises(ValueError, match=sentence):
        verify_checkpoint(tmp_path / "step-00000020")
    assert checkpoints.newest() == str(tmp_path / "step-00000010")
    assert re.search(f"step-00000020 is passed over: .*{sentence}", reports[-1])
    got = emptied(shards(truth(), (0, 1), (0, 1), True))
    if damage is not _flip_header:  # names of rectangles, which loading takes from the manifest
        with pytest.raises(ValueError, match=sentence):
            load_checkpoint(tmp_path / "step-00000020", got)
    assert load_checkpoint(tmp_path / "step-00000010", got).tokens == 100
    assert all(torch.equal(shard.values, truth(10)[shard.name].reshape(-1)) for shard in got)
    checkpoints.close()
