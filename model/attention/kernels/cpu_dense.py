"""Causal attention of short whole rows on a CPU: dense matrix products, a tile of 128 queries at a time.

A tile meets only the keys up to its end, so little of the future is computed, and all rows and heads of the batch go into
one batched product. The price is memory: the probabilities are kept for the backward. Scores and their gradients are
computed in float32: rounded to bf16 they would double the error.

`python -m benchmarks.attention --backends` (docs/results/attention_cpu_backends.md), 4 heads of 64, against torch's fused
kernel: bf16 37 against 53 ms at 256 tokens and 50 against 82 at 512; float32 76 against 97 at 512, 132 against 131 at
1,024. The limit of 512 tokens keeps the memory small: the probabilities grow with the square of the length.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from model.attention.kernels.inputs import accumulation_dtype

DENSE_ROWS = 128
"""Queries of a tile."""


def dense_attention(q_BSnH: Tensor, k_BSkH: Tensor, v_BSkH: Tensor, scale: float) -> Tensor:
    """Causal attention [B, S, n, Hv]; key heads serve groups of query heads, and value heads may be narrower."""
    return torch.ops.tiglon.short_attention(*_heads_first(q_BSnH, k_BSkH, v_BSkH), scale)[0].transpose(1, 2)


def dense_attention_with_lse(q_BSnH: Tensor, k_BSkH: Tensor, v_BSkH: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`dense_attention`, bit for bit, and the natural log-sum-exp of the scaled scores [B, S, n], without a gradient."""
    out, _, lse = torch.ops.tiglon.short_attention_lse(*_heads_first(q_BSnH, k_BSkH, v_BSkH), scale)
    return out.transpose(1, 2), lse.transpose(1, 2)


def _heads_first(q_BSnH: Tensor, k_BSkH: Tensor, v_BSkH: Tensor) -> Iterator[Tensor]:
    """[B, n, S, size] of each, keys and values repeated for every query head."""
    group = q_BSnH.shape[2] // k_BSkH.shape[2]
    if group > 1:
        k_BSkH, v_BSkH = (x.repeat_interleave(group, dim=2) for x in (k_BSkH, v_BSkH))
    return (x.transpose(1, 2).contiguous() for x in (q_BSnH, k_BSkH, v_BSkH))


def _tiles(length: int) -> Iterator[tuple[int, int]]:
    """First and past-the-last query of each tile."""
    return ((start, min(start + DENSE_ROWS, length)) for start in range(0, length, DENSE_ROWS))


def _probability_count(batch: int, length: int) -> int:
    """Elements of the probabilities that are kept for the backward."""
    return batch * sum((end - start) * end for start, end in _tiles(length))


def _tile_probabilities(p: Tensor, batch: int, length: int) -> Iterator[tuple[int, int, Tensor]]:
    """Each tile with its probabilities [batch, queries, keys] in the flat tensor that holds them all."""
    offset = 0
    for start, end in _tiles(length):
        count = batch * (end - start) * end
        yield start, end, p[offset : offset + count].view(batch, end - start, end)
        offset += count


@torch.library.custom_op("tiglon::short_attention", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output and the flat probabilities; q, k, v [B, n, S, H]."""
    return _compute(q, k, v, scale, None)


@torch.library.custom_op("tiglon::short_attention_lse", mutates_args=())
def _forward_with_lse(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """The same and the log-sum-exp [B, n, S], which costs one more pass over the scores."""
    lse = q.new_empty(q.shape[:3], dtype=accumulation_dtype(q.dtype))
    return *_compute(q, k, v, scale, lse), lse


def _compute(q: Tensor, k: Tensor, v: Tensor, scale: float, lse: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output and probabilities; the log-sum-exp is written into `lse`."""
    B, n, S, _ = q.shape
    wide = accumulation_dtype(q.dtype)
    out, p = v.new_empty(v.shape), v.new_empty(_probability_count(B * n, S))
    q, k, v, out_rows = q.flatten(0, 1).to(wide) * scale, k.flatten(0, 1).to(wide), v.flatten(0, 1), out.flatten(0, 1)
    future = torch.full((DENSE_ROWS, DENSE_ROWS), float("-inf"), dtype=wide, device=q.device).triu_(1)
    for start, end, probabilities in _tile_probabilities(p, B * n, S):
        scores = torch.bmm(q[:, start:end], k[:, :end].transpose(1, 2))
        scores[..., start:].add_(future[: end - start, : end - start])
        if lse is not None:
            lse.flatten(0, 1)[:, start:end] = torch.logsumexp(scores, dim=-1)
        probabilities.copy_(torch.softmax(scores, dim=-1))
        torch.bmm(probabilities, v[:, :end], out=out_rows[:, start:end])
    return out, p


@_forward.register_fake
def _(q, k, v, scale):
    B, n, S, _ = q.shape
    return v.new_empty(v.shape), v.new_empty(_probability_count(B * n, S))


@_forward_with_lse.register_fake
def _(q, k, v, scale):
    B, n, S, _ = q.shape
    lse = q.new_empty(B, n, S, dtype=accumulation_dtype(q.dtype))
    return v.new_empty(v.shape), v.new_empty(_probability_count(B * n, S)), lse


@torch.library.custom_op("tiglon::short_attention_backward", mutates_args=())
def _backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, p: Tensor, scale: float) -> list[Tensor]:
    """Gradients of q, k and v; grad and out [B, n, S, Hv]."""
    B, n, S, _ = q.shape
    shapes = [x.shape for x in (q, k, v)]
    wide = accumulation_dtype(q.dtype)
    grad, q, k, v, out = (x.flatten(0, 1) for x in (grad.contiguous(), q, k, v, out))
    d_q, d_k, d_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    wide_grad = grad.to(wide) * scale
    wide_v, dot = v.to(wide), (wide_grad * out).sum(-1, keepdim=True)
    for start, end, probabilities in _tile_probabilities(p, B * n, S):
        d_v[:, :end].baddbmm_(probabilities.transpose(1, 2), grad[:, start:end])
        d_scores = torch.bmm(wide_grad[:, start:end], wide_v[:, :end].transpose(1, 2)).sub_(dot[:, start:end])
        d_scores = d_scores.mul_(probabilities).to(q.dtype)
        torch.bmm(d_scores, k[:, :end], out=d_q[:, start:end])
        d_k[:, :end].baddbmm_(d_scores.transpose(1, 2), q[:, start:end])
    return [x.view(shape) for x, shape in zip((d_q, d_k, d_v), shapes, strict=True)]


@_backward.register_fake
def _(grad, q, k, v, out, p, scale):
    return [x.new_empty(x.shape) for x in (q, k, v)]


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    q, k, v, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output[:2])
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple:
    return *torch.ops.tiglon.short_attention_backward(grad, *ctx.saved_tensors, ctx.scale), None


_forward.register_autograd(_differentiate, setup_context=_save)
_forward_with_lse.register_autograd(_differentiate, setup_context=_save)
