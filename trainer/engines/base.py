"""The interface of an engine, implemented by trainer/engines/zero.py (DeepSpeed) and trainer/engines/fold.py."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from model.parallel.mesh import Mesh
from model.parameters import ParameterSpec, tensors_of
from model.sizes import parameter_specs
from trainer.checkpoint.rectangles import Shard, StepPart
from trainer.optimizers.fragments import Fragment
from trainer.optimizers.step import UpdateResult


class MicroBatch(Protocol):
    """One micro-batch of one data-parallel rank, made by data/corpus/stream.py."""

    @property
    def inputs_BS(self) -> Tensor: ...  # noqa: N802
    @property
    def targets_BS(self) -> Tensor: ...  # noqa: N802
    @property
    def cu_seqlens(self) -> Tensor | None: ...


@dataclass(frozen=True)
class StepHooks:
    """What an engine calls in the middle of a step."""

    mark: Callable[[str], object] = lambda part: None
    """After each forward and backward, with "forward" and "backward": that part is over. Before them, with "pipeline": this
    rank has waited for other stages."""
    leave: Callable[[], bool] = lambda: False
    """Between micro-batches: whether to drop the rest of the step, alike on all ranks. An engine that has changed optimizer
    state by then does not ask."""
    before_state_changes: Callable[[], object] = lambda: None
    """Before optimizer state changes in `accumulate`. An engine that changes it in `update` only does not call it."""


NO_HOOKS = StepHooks()


@dataclass(frozen=True)
class TrainingState:
    """Bytes that one rank holds from step to step; gradients and activations come and go."""

    weights: int
    others: int
    what: str
    """What the others are."""


class Engine(Protocol):
    """Gradients and updates, however ranks hold weights, gradients and optimizer state.

    It is given StepHooks when it is made.
    """

    model: Any
    """The decoder, whose weights every rank may read between updates (through its forward under ZeRO 3)."""
    description: str
    """Its name, and how ranks share the training state."""

    def accumulate(self, batches: Sequence[MicroBatch]) -> Tensor | None:
        """Forward and backward of one update's micro-batches; mean loss in nats per target over all ranks (0-dim, on device).

        None: `leave` said so between two micro-batches; weights and optimizer state are as before.
        """
        ...

    def update(self, learning_rate: float, skip: bool = False) -> UpdateResult:
        """Update the weights; with `skip` leave them alone and drop the gradients."""
        ...

    def fragments(self) -> list[Fragment]:
        """What this rank holds of every parameter."""
        ...

    def shards(self) -> list[Shard]:
        """Weights and optimizer state, for saving and loading; each says in which part of a step it changes."""
        ...

    def training_state(self) -> TrainingState:
        """What this rank holds."""
        ...

    def loaded(self, step: int) -> None:
        """Use what a checkpoint of that step has put into the shards."""
        ...

    def close(self) -> None:
        """Remove hooks and free buffers."""
        ...


def network_specs(model: Any, mesh: Mesh) -> Mapping[str, ParameterSpec]:
    """All tensors of the network by name, those of layers and experts that other ranks have among them."""
    if mesh.pipeline.size > 1 or mesh.experts.size > 1:
        return parameter_specs(model.config)
    tensors = [tensor for name, parameter in model.owned_parameters().items() for tensor in tensors_of(name, parameter)]
    return {tensor.name: tensor.spec for tensor in tensors}


def count_targets(batches: Sequence[MicroBatch], mesh: Mesh) -> Tensor:
    """Targets scored in an update over all data ranks: float32, 0-dim, on the device, which is not waited for. Context ranks
    have the same batches."""
    targets = torch.stack([(batch.targets_BS >= 0).sum() for batch in batches]).sum()
    if targets.device != mesh.device:
        targets = torch.full((), int(targets), device=mesh.device)  # a copy would wait
    return mesh.data.sum(targets.float())


def on_device(batch: MicroBatch, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """Inputs and targets [B, S] of a micro-batch, copied to the device asynchronously, and its document boundaries on the host.

    The network makes lists from the boundaries whose lengths the host must know (model/positions/packing.py).
    """
    inputs, targets = (x.to(device, non_blocking=True) for x in (batch.inputs_BS, batch.targets_BS))
    return inputs, targets, batch.cu_seqlens


def make_shards(fragments: list[Fragment], mesh: Mesh, partitioned: bool) -> list[Shard]:
    """Shards of a checkpoint for all weights and optimizer states: `weight/NAME`, `momentum/NAME`, ...

    Args:
        partitioned: replicas hold different parts (ZeRO), and states change in `update` only, as weights do; else they hold the
            same, and states of granularity element change in `accumulate` already.
    """
    shards: list[Shard] = []
    for fragment in fragments:
        position = (fragment.shape, fragment.slice_shape, fragment.slice_start, fragment.offset)
        replica = _holders(mesh, partitioned, fragment)
        for name, values in {"weight": fragment.values, **fragment.state}.items():
            shard = f"{name}/{fragment.name}"
            if fragment.granularity.get(name, "element") == "element":
                changes_in: StepPart = "update" if partitioned or name == "weight" else "accumulate"
                shards.append(Shard(shard, *position, values, replica, changes_in, fragment.padding))
                continue
            rows, per_row = fragment.rows, fragment.granularity[name] == "row"
            whole = len(rows) == fragment.full_rows or not per_row
            padding = fragment.padding if per_row else 0
            full = fragment.full_rows - padding
            shape, own, start = ((full,), (len(rows),), (rows.start,)) if per_row else ((1,), (1,), (0,))
            holders = _holders(mesh, False, fragment, whole)
            shards.append(Shard(shard, shape, own, start, 0, values.view(-1), holders, "update", padding))
    return shards


def _holders(mesh: Mesh, partitioned: bool, fragment: Fragment, whole: bool = False) -> tuple[int, int]:
    """(index, count) of this rank among those that hold the same values.

    Args:
        partitioned: replicas hold different ones.
        whole: tensor-parallel ranks hold the same ones though they have different slices.
    """
    replicas, tensor = mesh.replicas_of(fragment.kind), mesh.tensor
    match partitioned, fragment.replicated or whole:
        case True, True:
            return tensor.rank, tensor.size
        case True, False:
            return 0, 1
        case False, True:
            return replicas.rank * tensor.size + tensor.rank, replicas.size * tensor.size
        case _:
            return replicas.rank, replicas.size


def held_bytes(shards: Sequence[Shard]) -> int:
    """Bytes of the values of shards."""
    return sum(shard.values.numel() * shard.values.element_size() for shard in shards)
