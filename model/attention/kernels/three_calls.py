"""Two regions by three calls of a kernel that computes nothing but causal attention of whole rows.

With window w, a sequence cut into chunks of w tokens is covered exactly once by
    chunks    each chunk on itself:                                causal, w x w
    previous  each chunk on the keys before it within the window:  a strict upper triangle, which is causal of size w - 1
              when queries and keys are both reversed
    far       tokens from w on, on the keys w tokens earlier:      causal, (S - w) x (S - w)
so the work is that of one causal attention of the whole sequence. Outputs are merged by their log-sum-exp. In the backward,
every call recomputes its probabilities with the *merged* log-sum-exp and output, which makes its gradients exactly its
share of the whole. Differentiating the merge instead would lose the derivative of each log-sum-exp, which fused kernels
drop without an error: the output stays right and the gradients of q and k are 15 % off.

It is how cuDNN computes two regions and sliding windows on a GPU, and how torch's kernel does on a CPU above 512 tokens.
On a CPU it pays for long rows: bf16 347 against 528 ms of cpu_tiled at 4,096 tokens, two regions, 4 heads of 64; float32 488
against 532. At 1,024 and 2,048 tokens the two differ by less than a fifth, either way
(`python -m benchmarks.attention --backends`, docs/results/attention_cpu_backends.md).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention.kernels.inputs import AttentionInputs
from model.attention.kernels.merge import merge

aten = torch.ops.aten


class CausalKernel(Protocol):
    """A kernel of causal attention on whole rows: q [B, S, n, H], k [B, S, k, H], v [B, S, k, Hv], lse [B, S, n]."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Output and natural log-sum-exp of the scaled scores."""
        ...

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, ...]:
        """Gradients of q, k, v; out and lse may be those of a larger softmax that these keys are part of."""
        ...


def swap_tokens_and_heads(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Swap the token and head dimensions, as torch's kernels want them."""
    return tuple(x.transpose(1, 2) for x in tensors)


@dataclass(frozen=True)
class _Chunks:
    """A sequence of `length` tokens as `count` chunks of `size`, the last one padded."""

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

    def previous_queries(self, x: Tensor) -> Tensor:
        """Queries of the call on previous chunks, reversed: chunks from the second on, without their last token."""
        return self.batch(self.cut(x)[:, 1:, :-1].flip(2))

    def previous_keys(self, x: Tensor) -> Tensor:
        """Keys of that call, reversed: chunks up to the last but one, without their first token."""
        return self.batch(self.cut(x)[:, :-1, 1:].flip(2))


def forward(
    kernel: CausalKernel, inputs: AttentionInputs, scale: float, window: int | None, compiled: bool = False
) -> tuple[Tensor, Tensor]:
    """Output [B, S, n, Hv] and log-sum-exp [B, S, n]; arguments as model.attention.kernels.reference.reference_attention.

    `compiled` compiles the merging of the three outputs into one pass over them.
    """
    q, k, v, S = inputs.near_q, inputs.near_k, inputs.v, inputs.v.shape[1]
    if window is None or window >= S:
        return kernel.forward(q, k, v, scale)
    chunks, previous, far = _Chunks(S, window), None, None
    chunk_q, chunk_k, chunk_v = (chunks.batch(chunks.cut(x)) for x in (q, k, v))
    within = kernel.forward(chunk_q, chunk_k, chunk_v, scale)
    if window > 1:
        previous = kernel.forward(chunks.previous_queries(q), chunks.previous_keys(k), chunks.previous_keys(v), scale)
    if inputs.far_q is not None and inputs.far_k is not None:
        far = kernel.forward(inputs.far_q[:, window:], inputs.far_k[:, : S - window], v[:, : S - window], scale)
    return (_compiled_join() if compiled else _join)(S, window, within, previous, far)


OutputAndLse = tuple[Tensor, Tensor]
"""Output and log-sum-exp of attention over some of the keys."""


def _join(
    length: int, window: int, within: OutputAndLse, previous: OutputAndLse | None, far: OutputAndLse | None
) -> OutputAndLse:
    """The whole attention from the results of the three calls."""
    chunks, dtype = _Chunks(length, window), within[0].dtype
    out, lse = (chunks.unbatch(x, chunks.count) for x in (within[0].to(within[1].dtype), within[1].clone()))
    if previous is not None:
        previous_out, previous_lse = (chunks.unbatch(x, chunks.count - 1).flip(2) for x in previous)
        merge(out[:, 1:, :-1], lse[:, 1:, :-1], previous_out, previous_lse)
    out, lse = chunks.join(out).contiguous(), chunks.join(lse).contiguous()
    if far is not None:
        merge(out[:, window:], lse[:, window:], *far)
    return out.to(dtype), lse


@cache
def _compiled_join() -> Callable[..., OutputAndLse]:
    """In eager mode the merging moves three times the bytes of the outputs themselves."""
    return torch.compile(_join)


def backward(
    kernel: CausalKernel, grad: Tensor, inputs: AttentionInputs, out: Tensor, lse: Tensor, scale: float, window: int | None
) -> AttentionInputs:
    """Gradients from grad and out [B, S, n, Hv] and lse [B, S, n]."""
    q, k, v, S = inputs.near_q, inputs.near_k, inputs.v, inputs.v.shape[1]
    if window is None or window >= S:
        return AttentionInputs(*kernel.backward(grad, q, k, v, out, lse, scale))
    chunks = _Chunks(S, window)
    cut = [chunks.batch(chunks.cut(x)) for x in (grad, q, k, v, out, lse)]
    within = kernel.backward(cut[0], cut[1], cut[2], cut[3], cut[4], cut[5], scale)
    d_q, d_k, d_v = (chunks.unbatch(x, chunks.count) for x in within)
    if window > 1:
        later = [chunks.previous_queries(x) for x in (grad, q, out, lse)]
        previous = kernel.backward(
            later[0], later[1], chunks.previous_keys(k), chunks.previous_keys(v), later[2], later[3], scale
        )
        previous_q, previous_k, previous_v = (chunks.unbatch(x, chunks.count - 1).flip(2) for x in previous)
        d_q[:, 1:, :-1] += previous_q
        d_k[:, :-1, 1:] += previous_k
        d_v[:, :-1, 1:] += previous_v
    d_q, d_k, d_v = (chunks.join(x) for x in (d_q, d_k, d_v))
    if inputs.far_q is None or inputs.far_k is None:
        return AttentionInputs(d_q, d_k, d_v)
    d_far_q, d_far_k = torch.zeros_like(inputs.far_q), torch.zeros_like(inputs.far_k)
    far = kernel.backward(
        grad[:, window:], inputs.far_q[:, window:], inputs.far_k[:, : S - window], v[:, : S - window],
        out[:, window:], lse[:, window:], scale,
    )  # fmt: skip
    d_far_q[:, window:], d_far_k[:, : S - window] = far[0], far[1]
    d_v[:, : S - window] += far[2]
    return AttentionInputs(d_q, d_k, d_v, d_far_q, d_far_k)
