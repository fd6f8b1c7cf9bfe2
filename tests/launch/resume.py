"""Save in one layout, resume in another: the cells of the resume matrix, and what must hold between two of them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
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
from model.parameters import tensors_of
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
    pipeline: int = 1
    schedule: str = "1f1b"
    layers: int = 2
    micro_batch: int = 2
    """Sequences in it."""
    experts: int = 0
    """Ranks that split the experts among themselves; 0: a network without experts."""

    def __str__(self) -> str:
        context = f"-context{self.context}-{self.exchange}" if self.context > 1 else ""
        pipeline = f"-pipeline{self.pipeline}-{self.schedule}" if self.pipeline > 1 else ""
        experts = f"-experts{self.experts}" if self.experts else ""
        return f"{self.optimizer}-{self.engine}-tensor{self.tensor}{context}{pipeline}-data{self.data}{experts}"

    @property
    def ranks(self) -> int:
        return self.tensor * self.context * self.pipeline * self.data


MORE: dict[str, dict[str, Any]] = {"muon": {"nesterov": False, "others": "tiger"}}
"""What an optimizer needs under fold, in every layout."""


def cells(optimizer: str) -> list[Cell]:
    """Every cell of an optimizer; fold trains Tiger and Muon only."""
    engines = ["zero1", "zero2", "zero3", *(["fold"] if optimizer in ("tiger", "muon") else [])]
    shapes = [(tensor, data, 1, "gather") for tensor in (1, 2) for data in (1, 2)]
    shapes += [(1, 1, 2, "gather"), (2, 1, 2, "heads")]
    return [Cell(tensor, data, engine, optimizer, *context) for tensor, data, *context in shapes for engine in engines]


def deep(optimizer: str, engine: str, tensor: int = 1, data: int = 1, context: int = 1, **pipeline: Any) -> Cell:
    """A cell of a network of four layers, whose updates have a micro-batch for each of four stages."""
    return Cell(tensor, data, engine, optimizer, context, layers=4, micro_batch=1, **pipeline)


def staged() -> list[Cell]:
    """Cells of pipelines, and of what they are to load from and be loaded by."""
    zero = [
        *(deep("adamw", engine, pipeline=size, schedule=schedule, tensor=tensor, data=data, context=context)
          for engine, size, schedule, tensor, data, context in PIPELINES),
        deep("adamw", "zero1"), deep("adamw", "zero1", tensor=2), deep("adamw", "zero1", context=2),
        *(deep("adamw", f"zero{stage}", data=2) for stage in (1, 2, 3)),
    ]  # fmt: skip
    fold = [
        deep("tiger", "fold", pipeline=size, schedule=schedule, tensor=tensor, data=data, context=context)
        for _, size, schedule, tensor, data, context in PIPELINES
    ]
    return [*zero, *fold, deep("tiger", "fold"), deep("tiger", "fold", data=2), deep("tiger", "zero2", pipeline=2)]


PIPELINES = (
    ("zero1", 2, "1f1b", 1, 1, 1), ("zero2", 2, "interleaved", 1, 1, 1), ("zero1", 4, "1f1b", 1, 1, 1),
    ("zero1", 2, "interleaved", 2, 1, 1), ("zero2", 2, "1f1b", 1, 2, 1), ("zero1", 2, "interleaved", 1, 2, 1),
    ("zero2", 2, "interleaved", 1, 1, 2), ("zero1", 4, "1f1b", 2, 1, 1),
)  # fmt: skip
"""Engine, size, schedule, tensor, data and context ranks."""


def mixtures() -> list[Cell]:
    """Cells of a network with experts."""
    zero = [
        Cell(1, 1, "zero2", "adamw"), Cell(1, 2, "zero3", "adamw"), Cell(1, 2, "zero1", "adamw", experts=2),
        Cell(2, 2, "zero2", "adamw", experts=2), Cell(1, 4, "zero1", "adamw", experts=4, micro_batch=1),
        Cell(1, 4, "zero2", "adamw", experts=2, micro_batch=1), Cell(1, 1, "zero2", "adamw", 2, "heads", experts=2),
        deep("adamw", "zero2", data=2, pipeline=2, experts=2), deep("adamw", "zero1", data=2, pipeline=2, tensor=2, experts=2),
        Cell(2, 2, "zero1", "muon", experts=2), Cell(1, 2, "zero2", "muon", experts=2), Cell(1, 1, "zero1", "muon"),
        Cell(1, 2, "fold", "muon", experts=2),
    ]  # fmt: skip
    fold = [
        Cell(1, 2, "fold", "tiger", experts=2),
        Cell(2, 2, "fold", "tiger", experts=2),
        Cell(1, 2, "zero2", "tiger", experts=2),
    ]
    return [replace(cell, layers=4, experts=max(1, cell.experts)) for cell in [*zero, *fold, Cell(1, 1, "fold", "tiger")]]


MIXTURE: dict[str, Any] = {
    "feed_forward": "moe", "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "first_k_dense_replace": 1, "router_bias_rate": 0.02, "router_aux_loss_coef": 0.01, "initializer_range": 0.1,
}  # fmt: skip


def config(cell: Cell) -> RunConfig:
    engine = {"engine": "fold"} if cell.engine == "fold" else {"engine": "zero", "zero_stage": int(cell.engine[-1])}
    return build_config(
        {
            "model": {
                "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": cell.layers,
                "num_attention_heads": 4, "num_key_value_heads": 2, "qk_norm": "rms", **(MIXTURE if cell.experts else {}),
            },
            "train": {
                "precision": "fp32", "sequence_length": LENGTH, "global_batch_size": SEQUENCES,
                "micro_batch_size": cell.micro_batch,
            },
            "optimizer": {
                "name": cell.optimizer, cell.optimizer: {"learning_rate": 1e-3, **MORE.get(cell.optimizer, {})},
                "max_grad_norm": 0.0,
            },
            "parallel": {
                **engine, "tensor_parallel_size": cell.tensor, "context_parallel_size": cell.context,
                "context_exchange": cell.exchange, "pipeline_parallel_size": cell.pipeline,
                "pipeline_schedule": cell.schedule, "expert_parallel_size": max(1, cell.experts),
            },
        }
    )  # fmt: skip


def batches(step: int, mesh: Mesh, micro_batch: int = 2) -> list[Any]:
    """The micro-batches of this rank: a pure function of the step."""
    tokens = torch.randint(0, VOCABULARY, (SEQUENCES, LENGTH + 1), generator=torch.Generator().manual_seed(step))
    share = SEQUENCES // mesh.data.size
    mine = tokens[mesh.data.rank * share :][:share]
    return [
        SimpleNamespace(inputs_BS=part[:, :-1].contiguous(), targets_BS=part[:, 1:].contiguous(), cu_seqlens=None)
        for part in mine.split(micro_batch)
    ]


def steps(
    engine: Engine, mesh: Mesh, first: int, count: int, release: Callable[[], object] = lambda: None, micro_batch: int = 2
) -> list[float]:
    """Train; the losses. `release` is called before each update."""
    losses = []
    for step in range(first, first + count):
        loss = engine.accumulate(batches(step, mesh, micro_batch))
        assert loss is not None
        losses.append(loss.item())
        release()
        engine.update(1e-3)
    return losses


def _engine(cell: Cell) -> tuple[Engine, Mesh]:
    mesh = make_mesh(
        cell.tensor, torch.device("cpu"), context_parallel_size=cell.context, pipeline_parallel_size=cell.pipeline,
        expert_parallel_size=max(1, cell.experts),
    )  # fmt: skip
    return make_engine(config(cell), mesh), mesh


def write_cells(rank: int, world_size: int, folder: str, written: list[Cell]) -> dict[str, list[float]]:
    """Train each cell, save it, train on: the losses after the checkpoint."""
    found = {}
    for cell in written:
        engine, mesh = _engine(cell)
        steps(engine, mesh, 0, SAVED, micro_batch=cell.micro_batch)
        group = dist.group.WORLD if world_size > 1 else None
        kept = Checkpoints(open_store, f"{folder}/{cell}", CheckpointConfig(), group, lambda text: None)
        kept.save(engine.shards(), CheckpointMeta(SAVED, 0, config(cell).model_dump(mode="json")))
        kept.wait_for_copy("accumulate")
        release = partial(kept.wait_for_copy, "update")  # a save is in flight
        found[str(cell)] = steps(engine, mesh, SAVED, AFTER, release, cell.micro_batch)
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
            found[str(reader), str(writer)] = steps(engine, mesh, SAVED, AFTER, micro_batch=reader.micro_batch)
        engine.close()
    return found


def _assert_equal(path: str, engine: Engine, writer: Cell) -> None:
    manifest = read_checkpoint_manifest(path)
    full = {name: read_tensor(path, name, manifest) for name in manifest.shapes}
    for name, parameter in engine.model.named_parameters():
        tensors = tensors_of(name, parameter)
        for tensor, part in zip(tensors, parameter.detach().reshape(len(tensors), -1), strict=True):
            want = full[f"weight/{tensor.name}"].reshape(-1)
            if part.numel() == want.numel():  # ZeRO 3 keeps its weights elsewhere
                assert torch.equal(part, want), f"the network's {tensor.name} is not that of {writer}"
    for shard in engine.shards():
        value = full[shard.name]
        for dimension, (start, size) in enumerate(zip(shard.slice_start, shard.slice_shape)):
            value = value.narrow(dimension, start, size)
        flat = value.reshape(-1)
        want = flat[shard.offset : shard.offset + shard.values.numel()]
        assert torch.equal(shard.values, want), f"{shard.name} of {writer} differs"


def by_world(chosen: list[Cell]) -> dict[int, list[Cell]]:
    """Cells by the number of ranks they need."""
    return {size: [cell for cell in chosen if cell.ranks == size] for size in sorted({cell.ranks for cell in chosen})}


def largest_difference(got: list[float], want: list[float]) -> float:
    """Relative, over a stretch of losses."""
    return max(abs(a - b) / abs(b) for a, b in zip(got, want, strict=True))
