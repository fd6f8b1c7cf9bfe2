"""What tensor-parallel ranks send each other, each with its gradient. Tensors have tokens first.

Everything here is out of place. Megatron-Core's own versions reduce in place, which changes a matrix product that
selective recomputation has kept: the recomputed forward would then reduce it a second time. They also drop the sum of a
tensor that is not contiguous, and allocate on the current CUDA device even where all tensors are on a CPU.

Every result is a copy or made by `_apart`: torch.compile takes a view of a result that leaves its graph from what the result
is itself a view of, and so past its gradient.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def share(x: Tensor, group: Any) -> Tensor:
    """x, alike on all ranks; the ranks' gradients are summed."""
    return _Share.apply(x, group)  # type: ignore[return-value]


def reduce(x: Tensor, group: Any) -> Tensor:
    """The sum over ranks, on all of them; each rank's gradient is that of the sum."""
    return _Reduce.apply(x, group)  # type: ignore[return-value]


def gather_tokens(x_tD: Tensor, group: Any) -> Tensor:
    """[T, D] from each rank's [T / ranks, D]; gradients are summed and each rank keeps those of its own tokens."""
    return _GatherTokens.apply(x_tD, group)  # type: ignore[return-value]


def reduce_scatter_tokens(x_TD: Tensor, group: Any) -> Tensor:
    """This rank's [T / ranks, D] of the sum over ranks; gradients are gathered."""
    return _ReduceScatterTokens.apply(x_TD, group)  # type: ignore[return-value]


def scatter_tokens(x_TD: Tensor, group: Any) -> Tensor:
    """This rank's [T / ranks, D] of a tensor that all ranks have alike; gradients are gathered."""
    return _ScatterTokens.apply(x_TD, group)  # type: ignore[return-value]


def gather_last(x: Tensor, group: Any) -> Tensor:
    """The ranks' tensors joined along the last dimension; each rank's gradient is its own slice."""
    return _GatherLast.apply(x, group)  # type: ignore[return-value]


def _reduced(x: Tensor, group: Any) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return _apart(total)


def _gathered(x: Tensor, group: Any) -> Tensor:
    """Along the first dimension."""
    whole = x.new_empty(x.shape[0] * dist.get_world_size(group), *x.shape[1:])
    dist.all_gather_into_tensor(whole, x.contiguous(), group=group)
    return _apart(whole)


def _reduce_scattered(x: Tensor, group: Any) -> Tensor:
    """Along the first dimension."""
    own = x.new_empty(x.shape[0] // dist.get_world_size(group), *x.shape[1:])
    dist.reduce_scatter_tensor(own, x.contiguous(), group=group)
    return _apart(own)


def _apart(x: Tensor) -> Tensor:
    """The same numbers in the same memory, and no view of x to autograd."""
    return torch.ops.aten._unsafe_view.default(x, x.shape)


def _own_slice(x: Tensor, group: Any, dimension: int) -> Tensor:
    size = x.shape[dimension] // dist.get_world_size(group)
    return x.narrow(dimension, dist.get_rank(group) * size, size).clone(memory_format=torch.contiguous_format)


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _apart(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _reduced(gradient, ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        return _reduced(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _gathered(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _reduce_scattered(gradient, ctx.group), None


class _ReduceScatterTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _reduce_scattered(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _gathered(gradient, ctx.group), None


class _ScatterTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _own_slice(x, group, 0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _gathered(gradient, ctx.group), None


class _GatherLast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        parts = _gathered(x[None], group)
        return torch.cat(parts.unbind(), dim=-1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _own_slice(gradient, ctx.group, -1), None
