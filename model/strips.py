"""Attention on a CPU by strips of 64 queries: matrix products of exactly the pairs that each region holds.

A strip's scores are [rows * heads, 64, keys], so memory is linear in the length. Works for every window, width of values and
dtype; below about 1,000 tokens it also beats torch's fused kernel applied three times (model/squares.py). bf16 is
computed in float32: without matrix units that costs nothing, and scores rounded to bf16 would double the error.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from model.heads import Heads

ROWS = 64


@dataclass(frozen=True)
class _Strip:
    """Queries [start, end); near keys [low, end); far keys [0, high); both in [low, edge)."""

    start: int
    end: int
    low: int
    high: int
    edge: int

    def near(self, window: int, group: int, device: torch.device) -> Tensor:
        """Which pairs of the strip's queries and keys [low, edge) are nearer than the window, [rows * group, keys]."""
        i = torch.arange(self.start, self.end, device=device).repeat_interleave(group)
        return i[:, None] - torch.arange(self.low, self.edge, device=device) < window

    def future(self, group: int, device: torch.device) -> Tensor:
        """Which pairs of the strip with itself lie in the future, [rows * group, rows]."""
        i = torch.arange(self.end - self.start, device=device)
        return i.repeat_interleave(group)[:, None] < i


def _strips(length: int, window: int | None, far: bool) -> Iterator[_Strip]:
    for start in range(0, length, ROWS):
        end = min(start + ROWS, length)
        low = 0 if window is None else max(0, start - window + 1)
        edge = low if window is None else max(low, end - window)
        yield _Strip(start, end, low, edge if far and end > (window or 0) else 0, edge)


class _Rows:
    """Rows with heads first: queries [B * k, S * group, H] (the group of a key head together), keys [B * k, S, H]."""

    def __init__(self, heads: Heads):
        self.batch, self.length, self.kv_heads = heads.v.shape[:3]
        self.group = heads.near_q.shape[2] // self.kv_heads
        self.wide = torch.float64 if heads.v.dtype == torch.float64 else torch.float32
        self.near_q, self.near_k, self.v = self.queries(heads.near_q), self.keys(heads.near_k), self.keys(heads.v)
        self.far = heads.far_q is not None and heads.far_k is not None
        if heads.far_q is not None and heads.far_k is not None:
            self.far_q, self.far_k = self.queries(heads.far_q), self.keys(heads.far_k)

    def queries(self, x: Tensor) -> Tensor:
        x = x.to(self.wide).unflatten(2, (self.kv_heads, self.group)).transpose(1, 2)
        return x.reshape(self.batch * self.kv_heads, self.length * self.group, -1)

    def keys(self, x: Tensor) -> Tensor:
        return x.to(self.wide).transpose(1, 2).reshape(self.batch * self.kv_heads, self.length, -1)

    def back(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Queries, outputs or gradients of them as [B, S, n, size]."""
        x = x.view(self.batch, self.kv_heads, self.length, self.group, -1).transpose(1, 2)
        return x.reshape(self.batch, self.length, self.kv_heads * self.group, -1).to(dtype)

    def back_keys(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Keys, values or gradients of them as [B, S, k, size]."""
        return x.view(self.batch, self.kv_heads, self.length, -1).transpose(1, 2).to(dtype)

    def rows(self, x: Tensor, strip: _Strip) -> Tensor:
        return x[:, strip.start * self.group : strip.end * self.group]

    def scores(self, strip: _Strip, window: int | None, scale: float) -> Tensor:
        """Scaled scores against keys [0 or low, end), those not seen at -inf."""
        scores = self.rows(self.near_q, strip) @ self.near_k[:, strip.low : strip.end].transpose(1, 2)
        near = strip.near(window, self.group, scores.device) if window is not None and strip.edge > strip.low else None
        if strip.high:
            far = self.rows(self.far_q, strip) @ self.far_k[:, : strip.high].transpose(1, 2)
            if near is not None:
                both = scores[..., : strip.edge - strip.low]
                both.copy_(torch.where(near, both, far[..., strip.low :]))
            scores = torch.cat((far[..., : strip.low], scores), dim=-1)
        elif near is not None:
            scores[..., : strip.edge - strip.low].masked_fill_(~near, float("-inf"))
        scores[..., strip.start - strip.end :].masked_fill_(strip.future(self.group, scores.device), float("-inf"))
        return scores.mul_(scale)


def forward(heads: Heads, scale: float, window: int | None) -> tuple[Tensor, Tensor]:
    """Output [B, S, n, Hv] and log-sum-exp [B, S, n]; arguments as model.heads.reference."""
    row = _Rows(heads)
    out = row.v.new_empty(*row.near_q.shape[:2], row.v.shape[-1])
    lse = row.v.new_empty(*row.near_q.shape[:2], 1)
    for strip in _strips(row.length, window, row.far):
        p = row.scores(strip, window, scale)
        largest = p.amax(dim=-1, keepdim=True)
        total = p.sub_(largest).exp_().sum(dim=-1, keepdim=True)
        row.rows(out, strip).copy_(torch.bmm(p, row.v[:, strip.end - p.shape[-1] : strip.end]).div_(total))
        row.rows(lse, strip).copy_(total.log_().add_(largest))
    return row.back(out, heads.v.dtype), row.back(lse, row.wide)[..., 0]


def backward(grad: Tensor, heads: Heads, out: Tensor, lse: Tensor, scale: float, window: int | None) -> Heads:
    """Gradients from grad and out [B, S, n, Hv] and lse [B, S, n]."""
    row = _Rows(heads)
    grad_o = row.queries(grad)
    dot = (grad_o * row.queries(out)).sum(dim=-1, keepdim=True)
    lse = row.queries(lse[..., None])
    d_near_q, d_near_k, d_v = (torch.zeros_like(x) for x in (row.near_q, row.near_k, row.v))
    d_far_q, d_far_k = (torch.zeros_like(row.far_q), torch.zeros_like(row.far_k)) if row.far else (None, None)
    for strip in _strips(row.length, window, row.far):
        p = row.scores(strip, window, scale).sub_(row.rows(lse, strip)).exp_()
        keys = slice(strip.end - p.shape[-1], strip.end)
        upstream = row.rows(grad_o, strip)
        d_v[:, keys].baddbmm_(p.transpose(1, 2), upstream)
        d_scores = torch.bmm(upstream, row.v[:, keys].transpose(1, 2)).sub_(row.rows(dot, strip)).mul_(p).mul_(scale)
        if strip.high:
            assert d_far_q is not None and d_far_k is not None
            d_far = d_scores[..., : strip.high].contiguous()
            d_scores = d_scores[..., strip.low :].contiguous()
            if strip.edge > strip.low and window is not None:
                near = strip.near(window, row.group, p.device)
                d_far[..., strip.low :].masked_fill_(near, 0.0)
                d_scores[..., : strip.edge - strip.low].masked_fill_(~near, 0.0)
            row.rows(d_far_q, strip).copy_(torch.bmm(d_far, row.far_k[:, : strip.high]))
            d_far_k[:, : strip.high].baddbmm_(d_far.transpose(1, 2), row.rows(row.far_q, strip))
        near_keys = slice(strip.low, strip.end)
        row.rows(d_near_q, strip).copy_(torch.bmm(d_scores, row.near_k[:, near_keys]))
        d_near_k[:, near_keys].baddbmm_(d_scores.transpose(1, 2), row.rows(row.near_q, strip))
    dtype = heads.v.dtype
    return Heads(
        row.back(d_near_q, dtype), row.back_keys(d_near_k, dtype), row.back_keys(d_v, dtype),
        None if d_far_q is None else row.back(d_far_q, dtype), None if d_far_k is None else row.back_keys(d_far_k, dtype),
    )  # fmt: skip
