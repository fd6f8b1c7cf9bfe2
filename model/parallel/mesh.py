"""The mesh of tensor- and data-parallel ranks, and its kit of layers."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.parallel.layers import Kit, serial_kit


@dataclass(frozen=True)
class Mesh:
    """This rank's coordinates and groups. Tensor-parallel ranks are adjacent: rank = data rank * tensor size + tensor rank."""

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


def make_mesh(tensor_parallel_size: int, device: torch.device, timeout_seconds: float = 600) -> Mesh:
    """Split the default process group into tensor- and data-parallel groups. All ranks call it.

    Args:
        timeout_seconds: after which a collective of a new group fails; the default group has its own.

    Raises:
        ValueError: the world size is no multiple of the tensor-parallel size.
    """
    if not dist.is_initialized():
        return Mesh(device=device)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if world_size % tensor_parallel_size:
        raise ValueError(
            f"{world_size} ranks cannot form groups of parallel.tensor_parallel_size = {tensor_parallel_size}; "
            "start a multiple of it"
        )
    world = dist.group.WORLD if world_size > 1 else None
    tensor_group, data_group = None, world
    if tensor_parallel_size > 1:
        from model.parallel.tensor import make_megatron_groups  # seconds to import: only where needed

        tensor_group, data_group = make_megatron_groups(tensor_parallel_size, timeout_seconds)
    data_parallel_size = world_size // tensor_parallel_size
    return Mesh(
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


def make_kit(mesh: Mesh, sequence_parallel: bool = False, dtype: torch.dtype = torch.float32) -> Kit:
    """The kit of a mesh: Megatron's layers where the tensor-parallel size is above 1, else torch's own.

    At size 1 Megatron's layers cost twice torch's host time for a small model and change nothing.
    """
    if mesh.tensor_parallel_size == 1:
        return serial_kit(dtype)
    from model.parallel.tensor import MegatronKit  # seconds to import: only where needed

    return MegatronKit(mesh.tensor_group, sequence_parallel, dtype)
