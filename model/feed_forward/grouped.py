"""Products of groups of rows, each with a matrix of its own: what experts are made of.

Rows are sorted by group. On a GPU torch's grouped matmul computes all groups in one launch and the host learns no size; where
it does not serve, and on a CPU, one product follows the other. Two custom operators, opaque to torch.compile, whose results
selective recomputation keeps as those of other products.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ALIGNMENT_BYTES = 16
"""Of the rows of every operand of torch's grouped matmul on a GPU."""


def grouped_linear(x_ND: Tensor, weight_EFD: Tensor, ends_E: Tensor) -> Tensor:
    """y_NF: rows [ends[e - 1], ends[e]) of x times the transposed matrix e, its first row 0.

    Args:
        ends_E: int32, past-the-last row of each group, not decreasing; the last is N.
    """
    return torch.ops.tiglon.grouped_linear(x_ND, weight_EFD, ends_E)


def _one_launch(*operands: Tensor) -> bool:
    """Whether torch's grouped matmul takes them, on a device where looking at the groups would make the host wait."""
    return all(x.is_cuda and x.dtype == torch.bfloat16 and x.shape[-1] * 2 % ALIGNMENT_BYTES == 0 for x in operands)


def _groups(ends_E: Tensor) -> Iterator[tuple[int, slice]]:
    """Index and rows of each group."""
    start = 0
    for index, end in enumerate(ends_E.tolist()):
        yield index, slice(start, end)
        start = end


@torch.library.custom_op("tiglon::grouped_linear", mutates_args=())
def _forward(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    if _one_launch(x, weight):
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    y = x.new_empty(x.shape[0], weight.shape[1])
    for index, rows in _groups(ends):
        torch.mm(x[rows], weight[index].t(), out=y[rows])
    return y


@_forward.register_fake
def _(x, weight, ends):
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op("tiglon::grouped_linear_backward", mutates_args=())
def _backward(gradient: Tensor, x: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the matrices, from that of y; 0 for the matrix of a group without rows."""
    if _one_launch(gradient, x, weight):
        return F.grouped_mm(gradient, weight, offs=ends), F.grouped_mm(gradient.t(), x, offs=ends)
    of_x, of_weight = torch.empty_like(x), torch.empty_like(weight)
    for index, rows in _groups(ends):
        torch.mm(gradient[rows], weight[index], out=of_x[rows])
        torch.mm(gradient[rows].t(), x[rows], out=of_weight[index])
    return of_x, of_weight


@_backward.register_fake
def _(gradient, x, weight, ends):
    return torch.empty_like(x), torch.empty_like(weight)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple:
    return *torch.ops.tiglon.grouped_linear_backward(gradient.contiguous(), *ctx.saved_tensors), None


_forward.register_autograd(_differentiate, setup_context=_save)
