"""Layouts without engines: the shards that tensor and data parallel ranks would hold of a few full tensors."""

import math
from pathlib import Path

import torch

from data.storage import open_store
from trainer.checkpoint.api import Checkpoints
from trainer.checkpoint.manifest import CheckpointMeta
from trainer.checkpoint.rectangles import Shard
from trainer.config import CheckpointConfig

SHAPES: dict[str, tuple[tuple[int, ...], int | None]] = {
    "model.embed_tokens.weight": ((34, 12), 0),
    "model.layers.0.self_attn.q_proj.weight": ((20, 12), 0),
    "model.layers.0.self_attn.o_proj.weight": ((12, 20), 1),
    "model.layers.0.input_layernorm.weight": ((12,), None),
    "model.norm.weight": ((12,), None),
}
"""name -> (full shape, dimension cut over tensor-parallel ranks)."""
KINDS = ("weight", "momentum", "second_moment")


def truth(seed: int = 0, kinds: tuple[str, ...] = KINDS, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The full tensors."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{kind}/{name}": torch.randn(shape, generator=generator).to(dtype)
        for kind in kinds
        for name, (shape, _) in SHAPES.items()
    }


def shards(full: dict[str, torch.Tensor], tensor: tuple[int, int], data: tuple[int, int], partitioned: bool) -> list[Shard]:
    """Shards of the rank (index, size) along tensor and data; a ZeRO-like flat partition, or whole slices (fold)."""
    found = []
    for name, value in full.items():
        shape, split = SHAPES[name.partition("/")[2]]
        start, extent = [0] * len(shape), list(shape)
        piece = value
        if split is not None:
            extent[split] //= tensor[1]
            start[split] = tensor[0] * extent[split]
            piece = value.narrow(split, start[split], extent[split])
        flat = piece.reshape(-1).clone()
        size = math.prod(extent)
        copies = 1 if split is not None else tensor[1]
        if partitioned:
            first, last = size * data[0] // data[1], size * (data[0] + 1) // data[1]
            replica = (tensor[0] % copies, copies)
        else:
            first, last = 0, size
            replica = (data[0] * copies + tensor[0] % copies, copies * data[1])
        found.append(Shard(name, shape, tuple(extent), tuple(start), first, flat[first:last], replica))
    return found


def emptied(given: list[Shard]) -> list[Shard]:
    """The same shards, their values lost."""
    for shard in given:
        shard.values.fill_(-7)
    return given


def saved(folder: Path, *steps: int, **settings: object) -> tuple[Checkpoints, list[str]]:
    """A run of one process that has saved these steps, and what it has reported."""
    reports: list[str] = []
    checkpoints = Checkpoints(open_store, folder, CheckpointConfig.model_validate(settings), None, reports.append)
    for step in steps:
        checkpoints.save(shards(truth(step), (0, 1), (0, 1), True), CheckpointMeta(step, step * 10))
    checkpoints.wait()
    return checkpoints, reports


def steps_in(folder: Path) -> list[int]:
    """Of the checkpoints in a directory."""
    return sorted(int(path.name[5:]) for path in folder.glob("step-*"))
