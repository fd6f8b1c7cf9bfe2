"""Save in one layout, resume in another: the cells of the resume matrix, and what must hold between two of them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from data.storage import open_store
from launch.checkpoints import load_checkpoint, read_checkpoint_manifest, read_tensor
from launch.config import RunConfig
from launch.engine import make_engine
from launch.load_config import build_config
from model.parallel.mesh import Mesh, make_mesh
from trainer.checkpoint.api import Checkpoints
from trainer.checkpoint.manifest import CheckpointMeta
from trainer.config import CheckpointConfig
from trainer.engines.base import Engine

SAVED, AFTER = 3, 5
"""Steps before the checkpoint, and steps compared after it."""
SEQUENCES, LENGTH, VOCABULARY = 4, 16, 64


@dataclass(frozen=True)
class Cell:
    """A layout, an engine ("zero1", "zero2", "zero3", "fold") and an optimizer."""

    tensor: int
    data: int
    engine: str
    optimizer: str
    context: int = 1
    exchange: str = "gather"

    def __str__(self) -> str:
        context = f"-context{self.context}-{self.exchange}" if self.context > 1 else ""
        return f"{self.optimizer}-{self.engine}-tensor{self.tensor}{context}-data{self.data}"

    @property
    def ranks(self) -> int:
        return self.tensor * self.context * self.data


MORE: dict[str, dict[str, Any]] = {"muon": {"nesterov": False, "others": "tiger"}}
"""What an optimizer needs under fold, in every layout."""


def cells(optimizer: str) -> list[Cell]:
    """Every cell of an optimizer; fold trains Tiger and Muon only."""
    engines = ["zero1", "zero2", "zero3", *(["fold"] if optimizer in ("tiger", "muon") else [])]
    shapes = [(tensor, data, 1, "gather") for tensor in (1, 2) for data in (1, 2)]
    shapes += [(1, 1, 2, "gather"), (2, 1, 2, "heads")]
    return [Cell(tensor, data, engine, optimizer, *context) for tensor, data, *context in shapes for engine in engines]


def config(cell: Cell) -> RunConfig:
    engine = {"engine": "fold"} if cell.engine == "fold" else {"engine": "zero", "zero_stage": int(cell.engine[-1])}
    return build_config(
        {
            "model": {
                "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2, "qk_norm": "rms",
            },
            "train": {
                "precision": "fp32", "sequence_length": LENGTH, "global_batch_size": SEQUENCES, "micro_batch_size": 2,
            },
            "optimizer": {
                "name": cell.optimizer, cell.optimizer: {"learning_rate": 1e-3, **MORE.get(cell.optimizer, {})},
                "max_grad_norm": 0.0,
            },
            "parallel": {
                **engine, "tensor_parallel_size": cell.tensor, "context_parallel_size": cell.context,
                "context_exchange": cell.exchange,
            },
        }
    )  # fmt: skip


def batches(step: int, mesh: Mesh) -> list[Any]:
    """The micro-batches of this rank: a pure function of the step."""
    tokens = torch.randint(0, VOCABULARY, (SEQUENCES, LENGTH + 1), generator=torch.Generator().manual_seed(step))
    share = SEQUENCES // mesh.data.size
    mine = tokens[mesh.data.rank * share :][:share]
    return [
        SimpleNamespace(inputs_BS=part[:, :-1].contiguous(), targets_BS=part[:, 1:].contiguous(), cu_seqlens=None)
        for part in mine.split(2)
    ]


def steps(engine: Engine, mesh: Mesh, first: int, count: int, release: Callable[[], object] = lambda: None) -> list[float]:
    """Train; the losses. `release` is called before each update."""
    losses = []
    for step in range(first, first + count):
        loss = engine.accumulate(batches(step, mesh))
        assert loss is not None
        losses.append(loss.item())
        release()
        engine.update(1e-3)
    return losses


def _engine(cell: Cell) -> tuple[Engine, Mesh]:
    mesh = make_mesh(cell.tensor, torch.device("cpu"), context_parallel_size=cell.context)
    return make_engine(config(cell), mesh), mesh


def write_cells(rank: int, world_size: int, folder: str, written: list[Cell]) -> dict[str, list[float]]:
    """Train each cell, save it, train on: the losses after the checkpoint."""
    found = {}
    for cell in written:
        engine, mesh = _engine(cell)
        steps(engine, mesh, 0, SAVED)
        group = dist.group.WORLD if world_size > 1 else None
        kept = Checkpoints(open_store, f"{folder}/{cell}", CheckpointConfig(), group, lambda text: None)
        kept.save(engine.shards(), CheckpointMeta(SAVED, 0, config(cell).model_dump(mode="json")))
        kept.wait_for_copy("accumulate")
        found[str(cell)] = steps(engine, mesh, SAVED, AFTER, partial(kept.wait_for_copy, "update"))  # a save is in flight
        kept.close()
        engine.close()
    return found


def read_cells(
    rank: int, world_size: int, folder: str, readers: list[Cell], writers: list[Cell], forget: bool = False
) -> dict[tuple[str, str], list[float]]:
    """Load the checkpoints of a reader's optimizer into one engine, one after another; (reader, writer) -> what follows.

    Args:
        forget: leave the optimizer's state out, as a control that the losses would show it.

    Raises:
        AssertionError: a tensor is not, bit for bit, what was saved.
    """
    found = {}
    for reader in readers:
        engine, mesh = _engine(reader)
        for writer in (writer for writer in writers if writer.optimizer == reader.optimizer):
            path = f"{folder}/{writer}/step-{SAVED:08d}"
            load_checkpoint(path, engine.shards(), only=(lambda name: name.startswith("weight/")) if forget else None)
            engine.loaded(SAVED)
            if not forget:
                _assert_equal(path, engine, writer)
            found[str(reader), str(writer)] = steps(engine, mesh, SAVED, AFTER)
        engine.close()
    return found


def _assert_equal(path: str, engine: Engine, writer: Cell) -> None:
    manifest = read_checkpoint_manifest(path)
    full = {name: read_tensor(path, name, manifest) for name in manifest.shapes}
    network = dict(engine.model.named_parameters())
    for shard in engine.shards():
        value = full[shard.name]
        for dimension, (start, size) in enumerate(zip(shard.slice_start, shard.slice_shape)):
            value = value.narrow(dimension, start, size)
        flat = value.reshape(-1)
        want = flat[shard.offset : shard.offset + shard.values.numel()]
        assert torch.equal(shard.values, want), f"{shard.name} of {writer} differs"
        kind, _, name = shard.name.partition("/")
        if kind == "weight" and network[name].numel() == flat.numel():  # ZeRO 3 keeps its weights elsewhere
            assert torch.equal(network[name].detach().reshape(-1), flat), f"the network's {name} is not that of {writer}"


def by_world(chosen: list[Cell]) -> dict[int, list[Cell]]:
    """Cells by the number of ranks they need."""
    return {size: [cell for cell in chosen if cell.ranks == size] for size in (1, 2, 4)}


def largest_difference(got: list[float], want: list[float]) -> float:
    """Relative, over a stretch of losses."""
    return max(abs(a - b) / abs(b) for a, b in zip(got, want, strict=True))
