"""Cross entropy from hidden states, in chunks of tokens, over a vocabulary that may be split over ranks.

Full float32 logits never exist at once: the forward takes a chunk of tokens, computes its logits, its loss and at once
its gradients, and keeps only the gradients of the hidden states and of the weight. The backward multiplies them by
the gradient of the loss. (Computing gradients in the forward is the method of Liger-Kernel and of torch's own
linear_cross_entropy, which has no vocabulary-parallel form.)
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class ChunkLimits:
    """Sizes of a chunk on one kind of device."""

    logits: int
    """Largest number of logits."""
    compiled_logits: int
    """The same where the softmax is compiled."""
    min_tokens: int
    """Smallest number of tokens, however many logits those are: each chunk adds to the gradient of the whole weight, which
    with fewer tokens takes longer than the products themselves."""


CHUNKS = {"cpu": ChunkLimits(1 << 22, 1 << 22, 256), "cuda": ChunkLimits(1 << 29, 1 << 30, 4096)}
"""By kind of device. On a CPU logits should stay in its cache: 17 MB in float32. On a GPU chunks should be few: the eager
softmax holds float32 logits and their bf16 gradient, 6 bytes per logit, 3.2 GB; the compiled one reads bf16 logits and
writes a bf16 gradient, 4 bytes per logit, 4.3 GB."""


def chunk_tokens(device_type: str, vocabulary: int, tokens: int, compiled: bool = False) -> int:
    """Tokens per chunk, for `tokens` tokens and this rank's part of the vocabulary: equal chunks but for a shorter last one."""
    limits = CHUNKS[device_type]
    logits = limits.compiled_logits if compiled else limits.logits
    most = max(limits.min_tokens, logits // vocabulary)
    return max(1, ceil(tokens / max(1, ceil(tokens / most))))


@dataclass(frozen=True)
class _Options:
    """Arguments of cross_entropy that autograd does not see."""

    group: Any
    rank: int
    compiled: bool
    vocabulary: int | None
    """Tokens of the full vocabulary: rows of the weight from there on are padding."""
    gradients: bool
    """Whether gradients are wanted: they are computed in the forward."""


def cross_entropy(
    h_TD: Tensor,
    weight_vD: Tensor,
    targets_T: Tensor,
    group: Any = None,
    rank: int = 0,
    compiled: bool = False,
    vocabulary: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum of -log p(target) in nats, and the number of scored targets.

    Args:
        h_TD: hidden states, the same on all ranks of `group`.
        weight_vD: this rank's rows of the output head: rows rank * v to (rank + 1) * v of the vocabulary.
        targets_T: token ids of the full vocabulary; -100 = not scored.
        group: process group over which the vocabulary is split, or None.
        compiled: compile the softmax and its gradient into one pass (whole vocabularies only).
        vocabulary: tokens of the full vocabulary: rows from there on are padding, multiplied but outside the softmax, so that
            their gradient is 0. Default: all rows of all ranks.

    Returns:
        Two 0-dim tensors, the same on all ranks of the group: loss (float32 or wider) and count (int64).
    """
    options = _Options(group, rank, compiled and group is None, vocabulary, torch.is_grad_enabled())
    loss, _, _ = _CrossEntropy.apply(h_TD, weight_vD, targets_T, options)  # type: ignore[misc]
    return loss, (targets_T >= 0).sum()


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h_TD: Tensor, weight_vD: Tensor, targets_T: Tensor, options: _Options
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        wide = torch.float64 if h_TD.dtype == torch.float64 else torch.float32
        total = torch.zeros((), dtype=wide, device=h_TD.device)
        tokens, first = h_TD.shape[0], options.rank * weight_vD.shape[0]
        columns = weight_vD.shape[0]
        if options.vocabulary is not None:
            columns = min(columns, max(0, options.vocabulary - first))
        chunk = chunk_tokens(h_TD.device.type, weight_vD.shape[0], tokens, options.compiled)
        dh_TD = torch.empty_like(h_TD) if options.gradients else None
        dweight_vD = torch.zeros_like(weight_vD, dtype=wide) if options.gradients and chunk != tokens else None
        for start in range(0, tokens, chunk):
            h, targets = h_TD[start : start + chunk], targets_T[start : start + chunk]
            if options.compiled:
                loss, dlogits = _compiled_softmax()(h @ weight_vD.t(), targets, columns)
            else:
                loss, dlogits = _softmax((h @ weight_vD.t()).to(wide), targets, first, columns, options.group)
            total += loss
            if dh_TD is not None:
                dlogits = dlogits.to(weight_vD.dtype)
                torch.mm(dlogits, weight_vD, out=dh_TD[start : start + chunk])
                dweight_vD = dlogits.t() @ h if dweight_vD is None else _add_product(dweight_vD, dlogits.t(), h)
            del dlogits  # before the next chunk has logits
        if dh_TD is not None and dweight_vD is not None:
            ctx.save_for_backward(dh_TD, dweight_vD.to(weight_vD.dtype))
        ctx.set_materialize_grads(False)
        return total, None, None

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        dh_TD, dweight_vD = ctx.saved_tensors
        return _scaled(dh_TD, gradient), _scaled(dweight_vD, gradient), None, None


def _scaled(x: Tensor, factor: Tensor) -> Tensor:
    """x times a float32 factor, in the dtype of x. Each product is rounded, never the factor: rounding it to bfloat16 would be
    an error of up to 0.4 % common to all gradients, and so to their norm."""
    if x.dtype != torch.bfloat16:
        return x * factor
    scaled = torch.empty_like(x)
    for part, out in zip(x.split(_SCALED_ROWS), scaled.split(_SCALED_ROWS)):
        out.copy_(part.float().mul_(factor))
    return scaled


_SCALED_ROWS = 8192
"""Rows that are float32 at once, to bound the memory."""


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total += a b in place. A GPU adds as it multiplies; two operations would write and read the product in between."""
    if total.is_cuda:
        return torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    total += a @ b  # torch has no product of bf16 that gives float32 on a CPU
    return total


def _softmax(logits: Tensor, targets: Tensor, first: int, columns: int, group: Any) -> tuple[Tensor, Tensor]:
    """Loss of a chunk and d loss / d logits, which is softmax - onehot with zero rows for targets not scored.

    The logits, float32 or wider, are overwritten. `first` is the token of column 0; columns from `columns` on are padding, of
    probability 0, on some rank perhaps all: the largest logit is that of all ranks, so nothing is infinite minus infinite.
    """
    if columns < logits.shape[1]:
        logits[:, columns:] = -torch.inf
    column = targets - first
    on_rank = (column >= 0) & (column < columns)
    column = torch.where(on_rank, column, 0)[:, None]
    largest = logits.amax(1, keepdim=True)
    if group is not None:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    logits -= largest
    target_logit = torch.where(on_rank, logits.gather(1, column)[:, 0], 0)
    exponentials = logits.exp_()
    denominator = exponentials.sum(1)
    if group is not None:
        both = torch.stack((target_logit, denominator))
        dist.all_reduce(both, group=group)
        target_logit, denominator = both[0], both[1]
    scored = targets >= 0
    loss = torch.where(scored, denominator.log() - target_logit, 0).sum()
    probabilities = exponentials.mul_((scored / denominator)[:, None])
    probabilities.scatter_add_(1, column, -(on_rank & scored).to(logits.dtype)[:, None])
    return loss, probabilities


def _whole_softmax(logits: Tensor, targets: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """The same for a whole vocabulary, out of place for the compiler; d logits in the dtype of the logits."""
    wide = logits.float()
    token = torch.arange(logits.shape[1], device=logits.device)
    if columns < logits.shape[1]:
        wide = torch.where(token < columns, wide, -torch.inf)
    scored = targets >= 0
    column = torch.where(scored, targets, 0)[:, None]
    shifted = wide - wide.amax(1, keepdim=True)
    exponentials = shifted.exp()
    denominator = exponentials.sum(1, keepdim=True)
    loss = torch.where(scored, denominator[:, 0].log() - shifted.gather(1, column)[:, 0], 0).sum()
    onehot = token == column
    return loss, ((exponentials / denominator - onehot.float()) * scored[:, None]).to(logits.dtype)


@functools.cache
def _compiled_softmax() -> Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]:
    return torch.compile(_whole_softmax, fullgraph=True)
