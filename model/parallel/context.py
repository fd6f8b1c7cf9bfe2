"""Context parallelism: ranks that share the tokens of every sequence, and what attention exchanges between them.

A sequence is cut into 2 n chunks for n ranks, and rank r has the chunks r and 2 n - 1 - r: queries of the one see few keys,
those of the other many, and together as many on every rank (Dubey et al. 2024, The Llama 3 Herd of Models, section 3.3.2).
Everything but attention works on a rank's own tokens. Attention exchanges in one of two ways:

    gather    the keys and values of all ranks are gathered, of the first half of the sequence and then of the second: the
              early chunk needs the first alone and attends while the second travels. Gradients are summed and scattered.
    heads     tokens are exchanged for heads: a rank has whole sequences of its share of the heads, and its results go back
              (Jacobs et al. 2023, DeepSpeed Ulysses).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from model.parallel.collectives import alias_without_view

ContextExchange = Literal["gather", "heads"]
_functional: Any = torch.ops._c10d_functional
"""torch's collectives as operators, which torch.compile traces, and which begin and end in two calls. Uncompiled code must do
without: their results would be known to autograd while gloo's threads write into them, and that destroys memory."""


@dataclass(frozen=True)
class ContextParallel:
    """The ranks that share the tokens of a sequence, as one of them sees it."""

    size: int = 1
    rank: int = 0
    group: Any = None
    exchange: ContextExchange = "gather"

    @property
    def gathers_keys(self) -> bool:
        """Whether a rank has the keys and values of all for its own queries."""
        return self.size > 1 and self.exchange == "gather"

    @property
    def exchanges_heads(self) -> bool:
        """Whether a rank has whole sequences of its share of the heads."""
        return self.size > 1 and self.exchange == "heads"

    def sum(self, x: Tensor) -> Tensor:
        """The sum over the ranks, without a gradient."""
        if self.size == 1:
            return x
        total = x.detach().clone()
        dist.all_reduce(total, group=self.group)
        return total

    def padded(self, length: int) -> int:
        """The next length that the ranks divide into chunks (tokens)."""
        unit = 2 * self.size
        return length if self.size == 1 else (length + unit - 1) // unit * unit

    def chunks(self, length: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """First and past-the-last token of this rank's early and late chunk, of a sequence of `length` tokens."""
        size, late = length // (2 * self.size), 2 * self.size - 1 - self.rank
        return (self.rank * size, (self.rank + 1) * size), (late * size, (late + 1) * size)

    def cut(self, x_BS: Tensor, fill: int = 0) -> Tensor:
        """This rank's tokens of sequences [B, S, ...], which are alike on all ranks: [B, 2 chunks, ...]. A length that does
        not divide is continued with `fill`."""
        if self.size == 1:
            return x_BS
        S = x_BS.shape[1]
        if (length := self.padded(S)) != S:
            x_BS = pad(x_BS, (*[0, 0] * (x_BS.dim() - 2), 0, length - S), value=fill)
        return torch.cat([x_BS[:, start:end] for start, end in self.chunks(length)], dim=1)

    def join(self, x_Bs: Tensor) -> Tensor:
        """[B, S, width] of every rank's tokens [B, 2 chunks, width]: the inverse of `cut`, padding included."""
        return torch.cat([half.result()[0] for half in self.begin_gather(x_Bs[:, :, None])], dim=1)[:, :, 0]

    def begin_gather(self, *parts: Tensor) -> "tuple[Gathering, Gathering]":
        """Begin to gather the first half of the sequences, then the second, from every rank's tokens, [B, 2 chunks, heads,
        width] each, in one message per half."""
        shapes = tuple((x.shape[2], x.shape[3]) for x in parts)
        early, late = torch.cat([x.flatten(2) for x in parts], dim=-1).chunk(2, dim=1)
        return Gathering(early, shapes, self, reverse=False), Gathering(late, shapes, self, reverse=True)

    def to_heads(self, *parts: Tensor) -> list[Tensor]:
        """Exchange tokens for heads: from each [B, 2 chunks, heads, width] a rank gets [B, S, its heads, width].

        Heads fewer than ranks are repeated, so that each rank gets one.
        """
        packed, shapes = [], []
        for x in parts:
            heads = x.shape[2]
            if heads % self.size:
                x = x.repeat_interleave(self.size // heads, dim=2)
            shapes.append((x.shape[2] // self.size, x.shape[3]))
            packed.append(x.unflatten(2, (self.size, -1)).flatten(3))
        sent = torch.cat(packed, dim=-1).movedim(2, 0)  # [ranks, B, 2 chunks, width of all]
        whole = self._in_order(_AllToAll.apply(sent.contiguous(), self))  # type: ignore[arg-type]
        return _unpacked(whole, shapes)

    def from_heads(self, x_BSnH: Tensor) -> Tensor:
        """The inverse, for results: from [B, S, own heads, width] of every rank [B, 2 chunks, all heads, width]."""
        B, _, n, H = x_BSnH.shape
        chunks = x_BSnH.reshape(B, 2 * self.size, -1, n * H)
        first, second = chunks.chunk(2, dim=1)
        sent = torch.stack((first, second.flip(1)), dim=2).movedim(1, 0)  # [ranks, B, 2, chunk, n H]
        received: Any = _AllToAll.apply(sent.contiguous(), self)  # [ranks, B, 2, chunk, n H]
        return received.movedim(0, 3).reshape(B, -1, self.size * n, H)

    def merge_attention(self, out: Tensor, lse: Tensor) -> Tensor:
        """The attention over the keys of all ranks [..., Hv], from this rank's over its own, out [..., Hv] and the natural
        log-sum-exp of its scores lse [...], in its dtype; without gradients."""
        largest = lse.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.group)
        weight = (lse - largest).exp_()[..., None]
        sums = torch.cat((out * weight, weight), dim=-1)
        dist.all_reduce(sums, group=self.group)
        return sums[..., :-1] / sums[..., -1:]

    def _in_order(self, x: Tensor) -> Tensor:
        """[B, S, width] from the tokens of every rank, [ranks, B, 2 chunks, width]."""
        first, second = x.chunk(2, dim=2)
        return torch.cat((first, second.flip(0))).movedim(0, 1).flatten(1, 2)


WHOLE_SEQUENCES = ContextParallel()
"""Sequences are whole on every rank."""


def _unpacked(x: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """The parts [..., heads, width] of what is packed in the last dimension."""
    pieces = x.split([heads * width for heads, width in shapes], dim=-1)
    return [piece.unflatten(-1, shape) for piece, shape in zip(pieces, shapes, strict=True)]


class Gathering:
    """Half of the sequences on its way from every rank.

    Args:
        x: this rank's chunk of every sequence, [B, chunk, width of all parts].
        shapes: heads and width of each part.
        reverse: whether later ranks have the earlier chunks.
    """

    def __init__(self, x: Tensor, shapes: Sequence[tuple[int, int]], context: ContextParallel, reverse: bool):
        self.shape, self.shapes, self.context, self.reverse = x.shape, shapes, context, reverse
        # a compiler cannot trace what two functions hand each other: there the sum of gradients is waited for at once
        self.travelling = None if torch.compiler.is_compiling() else _Travelling()
        self.arriving: Any = _BeginGather.apply(x.contiguous(), context, self.travelling)

    def result(self, tokens: int | None = None) -> list[Tensor]:
        """Each part once it has arrived, [B, tokens, heads, width]: of the first `tokens`, default all, in order."""
        x: Any = _FinishGather.apply(self.arriving, self.context, self.travelling)
        x = x.view(self.context.size, *self.shape)
        whole = (x.flip(0) if self.reverse else x).movedim(0, 1).flatten(1, 2)
        return _unpacked(whole[:, :tokens], self.shapes)


class _Travelling:
    """What is on its way between ranks: a tensor that others write into, which no graph knows before it has arrived."""

    tensor: Tensor
    work: Any

    def begin_gather(self, x: Tensor, context: ContextParallel) -> None:
        """Begin to gather x of every rank along the first dimension."""
        self.tensor = x.new_empty(x.shape[0] * context.size, *x.shape[1:])
        self.work = dist.all_gather_into_tensor(self.tensor, x, group=context.group, async_op=True)

    def begin_scatter(self, x: Tensor, context: ContextParallel) -> None:
        """Begin to sum x over ranks, of which this rank gets its part along the first dimension."""
        self.tensor = x.new_empty(x.shape[0] // context.size, *x.shape[1:])
        self.work = dist.reduce_scatter_tensor(self.tensor, x, group=context.group, async_op=True)

    def arrived(self) -> Tensor:
        """What was on its way, once it is here."""
        tensor, work = self.tensor, self.work
        del self.tensor, self.work
        work.wait()
        return tensor


class _BeginGather(torch.autograd.Function):
    """Begins to gather along the first dimension; where `travelling` holds what arrives, its own result is empty, and only
    a place in the graph. Its backward ends what that of `_FinishGather` began."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, context: ContextParallel, travelling: _Travelling | None) -> Tensor:
        ctx.context, ctx.travelling = context, travelling
        if travelling is None:
            return _functional.all_gather_into_tensor(x, context.size, context.group.group_name)
        travelling.begin_gather(x, context)
        return x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        if ctx.travelling is not None:
            return ctx.travelling.arrived(), None, None
        local = _functional.reduce_scatter_tensor(gradient, "sum", ctx.context.size, ctx.context.group.group_name)
        return alias_without_view(_functional.wait_tensor(local)), None, None


class _FinishGather(torch.autograd.Function):
    """Waits for what `_BeginGather` began. Its backward begins to sum the gradient and to scatter it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, context: ContextParallel, travelling: _Travelling | None) -> Tensor:
        ctx.context, ctx.travelling = context, travelling
        return alias_without_view(_functional.wait_tensor(x)) if travelling is None else travelling.arrived()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        gradient = gradient.contiguous()
        if ctx.travelling is None:
            return gradient, None, None
        ctx.travelling.begin_scatter(gradient, ctx.context)
        return gradient.new_empty(0), None, None


class _AllToAll(torch.autograd.Function):
    """Part i along the first dimension goes to rank i; of the result, part i has come from rank i."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, context: ContextParallel) -> Tensor:
        ctx.context = context
        return _all_to_all(x, context)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _all_to_all(gradient.contiguous(), ctx.context), None


def _all_to_all(x: Tensor, context: ContextParallel) -> Tensor:
    if torch.compiler.is_compiling():
        parts: Sequence[int] = [1] * context.size
        return alias_without_view(
            _functional.wait_tensor(_functional.all_to_all_single(x, parts, parts, context.group.group_name))
        )
    received = torch.empty_like(x)
    dist.all_to_all_single(received, x, group=context.group)
    return received
