"""The mesh of ranks: the axes over which a run is split, and this rank's place and process group on each of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from model.parallel.context import ContextExchange, ContextParallel
from model.parallel.expert import ExpertParallel
from model.parallel.layers import Kit, serial_kit
from model.parallel.pipeline import PipelineParallel

AXES = ("pipeline", "data", "context", "tensor")
"""As in torch's DeviceMesh: the neighbours of an axis are the further apart, the earlier it stands here."""
REPLICAS = ("data", "context")
"""The axes over which weights are replicated."""
STAGE = ("data", "context", "tensor")
"""The axes over which ranks have the same layers."""


@dataclass(frozen=True)
class Axis:
    """The ranks of one axis, or of several together, as one of them sees it."""

    size: int = 1
    rank: int = 0
    group: Any = None
    """torch's process group; None: this rank is alone."""

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def max(self, tensor: Tensor) -> Tensor:
        """The largest of the ranks' elements, in place."""
        if self.group is not None:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return tensor


@dataclass(frozen=True)
class Mesh:
    """This rank's place on every axis; the default is a process alone."""

    tensor: Axis = Axis()
    """Splits every layer."""
    context: Axis = Axis()
    """Splits the tokens of a sequence."""
    data: Axis = Axis()
    """Splits a batch: its ranks get different sequences."""
    pipeline: Axis = Axis()
    """Splits the layers among stages."""
    replicas: Axis = Axis()
    """context x data: the ranks with the same weights, which see different tokens. Gradients, momenta, losses and counts of
    tokens are summed over them."""
    stage: Axis = Axis()
    """tensor x context x data: the ranks with the same layers."""
    experts: Axis = Axis()
    """Neighbours among the replicas that have different experts."""
    expert_replicas: Axis = Axis()
    """Those of the replicas that have the same experts."""
    world: Axis = Axis()
    """All ranks."""
    ends: Axis = Axis()
    """On the ranks with the first and with the last layers: these two, which both have a tied embedding."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    devices: DeviceMesh | None = None
    """torch's own mesh of the four axes; None without process groups. An axis of one rank has a group of this rank there."""

    def replicas_of(self, kind: str) -> Axis:
        """The ranks with the same weights of a kind."""
        return self.expert_replicas if kind == "expert" else self.replicas

    @property
    def partition(self) -> Axis:
        """The ranks that ZeRO cuts gradients, optimizer state and weights for: all that have the same weights."""
        return self.replicas


def rank_grid(
    world_size: int, tensor_parallel_size: int, context_parallel_size: int = 1, pipeline_parallel_size: int = 1
) -> Tensor:  # fmt: skip
    """All ranks by their place on AXES, int64 [pipeline, data, context, tensor]: tensor-parallel ranks are neighbours, and
    their groups those of the context-parallel ones; stages are furthest apart.

    Raises:
        ValueError: the world size is no multiple of the three sizes.
    """
    sizes = {"tensor": tensor_parallel_size, "context": context_parallel_size, "pipeline": pipeline_parallel_size}
    if world_size % (group := math.prod(sizes.values())):
        shown = [f"parallel.{axis}_parallel_size = {size}" for axis, size in sizes.items() if size > 1 or axis == "tensor"]
        raise ValueError(
            f"{world_size} rank{'s' if world_size > 1 else ''} cannot form groups of {' x '.join(shown)}; "
            f"start a multiple of {group} ranks"
        )
    return torch.arange(world_size).view(pipeline_parallel_size, -1, context_parallel_size, tensor_parallel_size)


def ranks_along(axes: Sequence[str], rank: int, grid: Tensor) -> list[int]:
    """The ranks whose place differs from this rank's on these axes only, itself among them, ascending."""
    place = (grid == rank).nonzero()[0].tolist()
    return grid[tuple(slice(None) if name in axes else place[index] for index, name in enumerate(AXES))].flatten().tolist()


def expert_ranks(replicas: Sequence[int], rank: int, size: int) -> tuple[list[int], list[int]]:
    """Of the ranks with the same dense weights, the `size` neighbours that have different experts, `rank` among them, and those
    that have its own.

    Raises:
        ValueError: they do not divide.
    """
    if len(replicas) % size:
        raise ValueError(
            f"parallel.expert_parallel_size = {size} does not divide the {len(replicas)} ranks that have the same weights "
            "otherwise (data x context parallel); change one of them"
        )
    place = replicas.index(rank)
    first = place // size * size
    return [*replicas[first : first + size]], [*replicas[place % size :: size]]


def make_mesh(
    tensor_parallel_size: int,
    device: torch.device,
    timeout_seconds: float = 600,
    context_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    expert_parallel_size: int = 1,
) -> Mesh:
    """Split the default process group into the groups of the axes. All ranks call it.

    The groups are made here and not by torch's init_device_mesh, which gives them torch's own timeout, and one to every axis.

    Args:
        timeout_seconds: after which a collective of a new group fails; the default group has its own.

    Raises:
        ValueError: as rank_grid and expert_ranks.
    """
    if not dist.is_initialized():
        return Mesh(device=device)
    sizes = (tensor_parallel_size, context_parallel_size, pipeline_parallel_size)
    rank, grid = dist.get_rank(), rank_grid(dist.get_world_size(), *sizes)
    groups = _Groups(rank, grid, timedelta(seconds=timeout_seconds))
    axes = {name: groups.along(name) for name in AXES}
    pipeline = ranks_along(["pipeline"], rank, grid)
    ends = [pipeline[0], pipeline[-1]]
    if rank not in ends:
        groups.make([rank])  # torch names a group after how many its process has: with fewer, a later mesh would not be met
    by_axis = [groups.made[tuple(ranks_along([name], rank, grid))] for name in AXES]
    return Mesh(
        **axes,
        **groups.of_experts(expert_parallel_size),
        replicas=groups.along(*REPLICAS),
        stage=groups.along(*STAGE),
        world=groups.along(*AXES),
        ends=groups.of(ends) if rank in ends and len(pipeline) > 1 else Axis(),
        device=device,
        devices=DeviceMesh.from_group(by_axis, device.type, grid, mesh_dim_names=AXES),
    )


class _Groups:
    """The process groups of a rank, each made once."""

    def __init__(self, rank: int, grid: Tensor, timeout: timedelta):
        self.rank, self.grid, self.timeout = rank, grid, timeout
        self.made: dict[tuple[int, ...], Any] = {tuple(range(grid.numel())): dist.group.WORLD}

    def along(self, *names: str) -> Axis:
        """The ranks along these axes."""
        return self.of(ranks_along(names, self.rank, self.grid))

    def of_experts(self, size: int) -> dict[str, Axis]:
        """The ranks with different experts and those with the same, where `size` ranks split them."""
        different, same = expert_ranks(ranks_along(REPLICAS, self.rank, self.grid), self.rank, size)
        return {"experts": self.of(different), "expert_replicas": self.of(same)}

    def make(self, ranks: Sequence[int]) -> Any:
        """A new group; its members alone make it."""
        return dist.new_group(list(ranks), self.timeout, use_local_synchronization=True)

    def of(self, ranks: Sequence[int]) -> Axis:
        """These ranks, this one among them."""
        if (key := tuple(ranks)) not in self.made:
            self.made[key] = self.make(ranks)
        return Axis(len(ranks), ranks.index(self.rank), self.made[key] if len(ranks) > 1 else None)


def make_kit(
    mesh: Mesh,
    sequence_parallel: bool = False,
    dtype: torch.dtype = torch.float32,
    context_exchange: ContextExchange = "gather",
    stage_bounds: tuple[int, ...] = (),
) -> Kit:
    """The kit of a mesh: Megatron's layers where the tensor-parallel size is above 1, else torch's own.

    At size 1 Megatron's layers cost twice torch's host time for a small model and change nothing.

    Args:
        stage_bounds: `PipelineParallel.bounds`.
    """
    if mesh.tensor.size == 1:
        kit = serial_kit(dtype)
    else:
        from model.parallel.tensor import MegatronKit  # seconds to import: only where needed

        kit = MegatronKit(mesh.tensor.group, sequence_parallel, dtype)
    kit.loss_scale = torch.ones((), device=mesh.device)
    kit.context = ContextParallel(mesh.context.size, mesh.context.rank, mesh.context.group, context_exchange)
    kit.experts = ExpertParallel(mesh.experts.size, mesh.experts.rank, mesh.experts.group)
    kit.pipeline = PipelineParallel(mesh.pipeline.size, mesh.pipeline.rank, mesh.pipeline.group, stage_bounds)
    return kit
