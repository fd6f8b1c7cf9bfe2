"""Collectives of tensor-parallel ranks, each with its gradient. Tensors have tokens first.

Everything here is out of place. Megatron-Core's own versions reduce in place, which changes a matrix product that
selective recomputation has kept: the recomputed forward would then reduce it a second time. They also drop the sum of a
tensor that is not contiguous, and allocate on the current CUDA device even where all tensors are on a CPU.

Every result is a copy or made by `alias_without_view`: when a view of a result leaves a graph, torch.compile takes it from
what the result is itself a view of, and so past its gradient.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def replicate(x: Tensor, group: Any) -> Tensor:
    """x, the same on all ranks; backward sums the ranks' gradients (f of Shoeybi et al. 2019, Megatron-LM)."""
    return _Replicate.apply(x, group)  # type: ignore[return-value]


def all_reduce(x: Tensor, group: Any) -> Tensor:
    """The sum over ranks, on all of them; each rank's gradient is that of the sum (g of Shoeybi et al. 2019)."""
    return _AllReduce.apply(x, group)  # type: ignore[return-value]


def gather_tokens(x_tD: Tensor, group: Any) -> Tensor:
    """[T, D] from each rank's [T / ranks, D]; gradients are summed and each rank keeps those of its own tokens."""
    return _GatherTokens.apply(x_tD, group)  # type: ignore[return-value]


def reduce_scatter_tokens(x_TD: Tensor, group: Any) -> Tensor:
    """This rank's [T / ranks, D] of the sum over ranks; gradients are gathered."""
    return _ReduceScatterTokens.apply(x_TD, group)  # type: ignore[return-value]


def scatter_tokens(x_TD: Tensor, group: Any) -> Tensor:
    """This rank's [T / ranks, D] of a tensor that is the same on all ranks; gradients are gathered."""
    return _ScatterTokens.apply(x_TD, group)  # type: ignore[return-value]


def gather_last(x: Tensor, group: Any) -> Tensor:
    """The ranks' tensors joined along the last dimension; each rank's gradient is its own slice."""
    return _GatherLast.apply(x, group)  # type: ignore[return-value]


def _summed(x: Tensor, group: Any) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return alias_without_view(total)


def _gather_first(x: Tensor, group: Any) -> Tensor:
    """The ranks' tensors joined along the first dimension."""
    full = x.new_empty(x.shape[0] * dist.get_world_size(group), *x.shape[1:])
    dist.all_gather_into_tensor(full, x.contiguous(), group=group)
    return alias_without_view(full)


def _reduce_scatter_first(x: Tensor, group: Any) -> Tensor:
    """This rank's part, along the first dimension, of the sum over ranks."""
    local = x.new_empty(x.shape[0] // dist.get_world_size(group), *x.shape[1:])
    dist.reduce_scatter_tensor(local, x.contiguous(), group=group)
    return alias_without_view(local)


def alias_without_view(x: Tensor) -> Tensor:
    """The same elements in the same memory, and no view of x to autograd. (A torch-private operator: the public views are
    tracked, and a copy would cost memory.)"""
    return torch.ops.aten._unsafe_view.default(x, x.shape)


def _local_slice(x: Tensor, group: Any, dimension: int) -> Tensor:
    """This rank's part along a dimension, a copy."""
    size = x.shape[dimension] // dist.get_world_size(group)
    return x.narrow(dimension, dist.get_rank(group) * size, size).clone(memory_format=torch.contiguous_format)


class _Replicate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return alias_without_view(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _summed(gradient, ctx.group), None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _gather_first(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _reduce_scatter_first(gradient, ctx.group), None


class _ReduceScatterTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _reduce_scatter_first(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _gather_first(gradient, ctx.group), None


class _ScatterTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _local_slice(x, group, 0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _gather_first(gradient, ctx.group), None


class _GatherLast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        parts = _gather_first(x[None], group)
        return torch.cat(parts.unbind(), dim=-1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _local_slice(gradient, ctx.group, -1), None
