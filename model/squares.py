"""Two regions as three causal squares, for kernels that know nothing but a plain causal square.

With window w, a sequence cut into chunks of w tokens is covered exactly once by
    own       each chunk on itself:                                causal, w x w
    previous  each chunk on the keys before it within the window:  a strict upper triangle, which is plain causal of
              size w - 1 when queries and keys are both reversed
    far       tokens from w on, on the keys w tokens earlier:      causal, (S - w) x (S - w)
so the work is that of one causal attention of the whole sequence. Outputs are merged by their log-sum-exp. Backward,
every square recomputes its probabilities with the *merged* log-sum-exp and output, which makes its gradients exactly its
share of the whole. Differentiating the merge instead would lose the derivative of each log-sum-exp, which fused kernels
drop without a word: the output stays right and the gradients of q and k are 15 % off.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from model.heads import Heads

aten = torch.ops.aten


class Square(Protocol):
    """A causal kernel on whole rows: q [B, S, n, H], k [B, S, k, H], v [B, S, k, Hv], lse [B, S, n]."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Output and natural log-sum-exp of the scaled scores."""
        ...

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, ...]:
        """Gradients of q, k, v; out and lse may be those of a larger softmax that this square is part of."""
        ...


def _flip(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Swap the token and head dimensions, as torch's kernels want them."""
    return tuple(x.transpose(1, 2) for x in tensors)


class CpuSquare:
    """torch's flash attention for CPUs. It wants values as wide as keys: narrower ones are padded with zeros."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """As Square."""
        width = v.shape[-1]
        v = F.pad(v, (0, q.shape[-1] - width))
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(*_flip(q, k, v), 0.0, True, scale=scale)
        return out.transpose(1, 2)[..., :width], lse.transpose(1, 2)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, ...]:
        """As Square."""
        width = v.shape[-1]
        v, out, grad = (F.pad(x, (0, q.shape[-1] - width)) for x in (v, out, grad))
        gradients = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *_flip(grad, q, k, v, out, lse), 0.0, True, scale=scale
        )
        d_q, d_k, d_v = _flip(*gradients)
        return d_q, d_k, d_v[..., :width]


class CudnnSquare:
    """cuDNN's fused attention, the fastest on Hopper. It takes several query heads to a key head, and narrower values."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """As Square."""
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(*_flip(q, k, v), None, True, 0.0, True, False, scale=scale)
        return out.transpose(1, 2), lse.reshape(q.shape[0], q.shape[2], q.shape[1]).transpose(1, 2)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, ...]:
        """As Square."""
        length = q.shape[1]
        seed = torch.zeros((), dtype=torch.int64, device=q.device)  # of a dropout that is not there
        stats = lse.transpose(1, 2).contiguous()[..., None]
        tensors = (x.contiguous() for x in (grad, q, k, v, out))
        gradients = aten._scaled_dot_product_cudnn_attention_backward(
            *_flip(*tensors), stats, seed, seed, None, None, None, length, length, 0.0, True, scale=scale
        )
        return _flip(*gradients)


@dataclass(frozen=True)
class _Chunks:
    """A sequence of `length` tokens as `count` chunks of `size`, the last one filled up."""

    length: int
    size: int

    @property
    def count(self) -> int:
        return -(-self.length // self.size)

    def cut(self, x: Tensor) -> Tensor:
        """[B, S, ...] as [B, count, size, ...]."""
        missing = self.count * self.size - self.length
        if missing:
            x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing))
        return x.unflatten(1, (self.count, self.size))

    def join(self, x: Tensor) -> Tensor:
        """The inverse of `cut`."""
        return x.flatten(1, 2)[:, : self.length]

    def batch(self, x: Tensor) -> Tensor:
        """[B, count, size, ...] with chunks as rows of the batch."""
        return x.flatten(0, 1)

    def unbatch(self, x: Tensor, count: int) -> Tensor:
        """The inverse of `batch`."""
        return x.unflatten(0, (-1, count))

    def later(self, x: Tensor) -> Tensor:
        """Queries of the previous-chunk triangle, reversed: chunks from the second on, without their last token."""
        return self.batch(self.cut(x)[:, 1:, :-1].flip(2))

    def earlier(self, x: Tensor) -> Tensor:
        """Keys of it, reversed: chunks up to the last but one, without their first token."""
        return self.batch(self.cut(x)[:, :-1, 1:].flip(2))


def merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> None:
    """Fold another part of the softmax into (out, lse) in place; out in the dtype of lse."""
    total = torch.logaddexp(lse, more_lse)
    out.mul_((lse - total).exp_()[..., None]).add_(more * (more_lse - total).exp_()[..., None])
    lse.copy_(total)


def forward(square: Square, heads: Heads, scale: float, window: int | None, compiled: bool = False) -> tuple[Tensor, Tensor]:
    """Output [B, S, n, Hv] and log-sum-exp [B, S, n]; arguments as model.heads.reference.

    `compiled` puts the parts together in one pass over them.
    """
    q, k, v, S = heads.near_q, heads.near_k, heads.v, heads.v.shape[1]
    if window is None or window >= S:
        return square.forward(q, k, v, scale)
    chunks, previous, far = _Chunks(S, window), None, None
    own_q, own_k, own_v = (chunks.batch(chunks.cut(x)) for x in (q, k, v))
    own = square.forward(own_q, own_k, own_v, scale)
    if window > 1:
        previous = square.forward(chunks.later(q), chunks.earlier(k), chunks.earlier(v), scale)
    if heads.far_q is not None and heads.far_k is not None:
        far = square.forward(heads.far_q[:, window:], heads.far_k[:, : S - window], v[:, : S - window], scale)
    return (_compiled_join() if compiled else _join)(S, window, own, previous, far)


Part = tuple[Tensor, Tensor]
"""Output and log-sum-exp of some of the keys."""


def _join(length: int, window: int, own: Part, previous: Part | None, far: Part | None) -> Part:
    """The whole attention from its three parts, as the squares gave them."""
    chunks, dtype = _Chunks(length, window), own[0].dtype
    out, lse = (chunks.unbatch(x, chunks.count) for x in (own[0].to(own[1].dtype), own[1].clone()))
    if previous is not None:
        more, more_lse = (chunks.unbatch(x, chunks.count - 1).flip(2) for x in previous)
        merge(out[:, 1:, :-1], lse[:, 1:, :-1], more, more_lse)
    out, lse = chunks.join(out).contiguous(), chunks.join(lse).contiguous()
    if far is not None:
        merge(out[:, window:], lse[:, window:], *far)
    return out.to(dtype), lse


@cache
def _compiled_join() -> Callable[..., Part]:
    """In eager mode the merging moves three times the bytes of the outputs themselves."""
    return torch.compile(_join)


def backward(square: Square, grad: Tensor, heads: Heads, out: Tensor, lse: Tensor, scale: float, window: int | None) -> Heads:
    """Gradients from grad and out [B, S, n, Hv] and lse [B, S, n]."""
    q, k, v, S = heads.near_q, heads.near_k, heads.v, heads.v.shape[1]
    if window is None or window >= S:
        return Heads(*square.backward(grad, q, k, v, out, lse, scale))
    chunks = _Chunks(S, window)
    cut = [chunks.batch(chunks.cut(x)) for x in (grad, q, k, v, out, lse)]
    own = square.backward(cut[0], cut[1], cut[2], cut[3], cut[4], cut[5], scale)
    d_q, d_k, d_v = (chunks.unbatch(x, chunks.count) for x in own)
    if window > 1:
        keys, values = chunks.earlier(k), chunks.earlier(v)
        more = square.backward(chunks.later(grad), chunks.later(q), keys, values, chunks.later(out), chunks.later(lse), scale)
        more_q, more_k, more_v = (chunks.unbatch(x, chunks.count - 1).flip(2) for x in more)
        d_q[:, 1:, :-1] += more_q
        d_k[:, :-1, 1:] += more_k
        d_v[:, :-1, 1:] += more_v
    d_q, d_k, d_v = (chunks.join(x) for x in (d_q, d_k, d_v))
    if heads.far_q is None or heads.far_k is None:
        return Heads(d_q, d_k, d_v)
    d_far_q, d_far_k = torch.zeros_like(heads.far_q), torch.zeros_like(heads.far_k)
    far = square.backward(
        grad[:, window:], heads.far_q[:, window:], heads.far_k[:, : S - window], v[:, : S - window],
        out[:, window:], lse[:, window:], scale,
    )  # fmt: skip
    d_far_q[:, window:], d_far_k[:, : S - window] = far[0], far[1]
    d_v[:, : S - window] += far[2]
    return Heads(d_q, d_k, d_v, d_far_q, d_far_k)
