"""How ranks are cut into tensor- and data-parallel groups, and the kit of layers that goes with the cut."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.layers import Kit, serial


@dataclass(frozen=True)
class Topology:
    """Where this rank stands. Tensor-parallel ranks are neighbours: rank = data rank * tensor size + tensor rank."""

    rank: int = 0
    world_size: int = 1
    tensor_parallel_size: int = 1
    tensor_parallel_rank: int = 0
    data_parallel_size: int = 1
    data_parallel_rank: int = 0
    tensor_group: Any = None
    data_group: Any = None
    world_group: Any = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def sum(self, tensor: Tensor, group: Any) -> Tensor:
        """Sum over a group, in place; a missing group is a group of one."""
        if group is not None:
            dist.all_reduce(tensor, group=group)
        return tensor


def make_topology(tensor_parallel_size: int, device: torch.device, timeout_seconds: float = 600) -> Topology:
    """Cut the running process group into tensor- and data-parallel groups (all ranks call it; once a process).

    Args:
        timeout_seconds: after which a collective of a new group fails; the running group has its own.

    Raises:
        ValueError: the world size is no multiple of the tensor-parallel size.
    """
    if not dist.is_initialized():
        return Topology(device=device)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if world_size % tensor_parallel_size:
        raise ValueError(
            f"{world_size} ranks cannot form groups of parallel.tensor_parallel_size = {tensor_parallel_size}; "
            "start a multiple of it"
        )
    world = dist.group.WORLD if world_size > 1 else None
    tensor_group, data_group = None, world
    if tensor_parallel_size > 1:
        from model.megatron import make_groups  # seconds to import: only where it is wanted

        tensor_group, data_group = make_groups(tensor_parallel_size, timeout_seconds)
    data_parallel_size = world_size // tensor_parallel_size
    return Topology(
        rank=rank,
        world_size=world_size,
        tensor_parallel_size=tensor_parallel_size,
        tensor_parallel_rank=rank % tensor_parallel_size,
        data_parallel_size=data_parallel_size,
        data_parallel_rank=rank // tensor_parallel_size,
        tensor_group=tensor_group,
        data_group=data_group if data_parallel_size > 1 else None,
        world_group=world,
        device=device,
    )


def tensor_parallel(topology: Topology, sequence_parallel: bool = False, dtype: torch.dtype = torch.float32) -> Kit:
    """The kit of a topology: Megatron's layers where the tensor-parallel size is above 1, else torch's own.

    At size 1 Megatron's layers cost twice torch's host time for a small model and change nothing.
    """
    if topology.tensor_parallel_size == 1:
        return serial(dtype)
    from model.megatron import MegatronKit  # seconds to import: only where it is wanted

    return MegatronKit(topology.tensor_group, sequence_parallel, dtype)
