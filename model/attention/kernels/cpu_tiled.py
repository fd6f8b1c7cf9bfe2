"""Attention on a CPU by tiles of 64 queries: matrix products of exactly the pairs that each region holds.

A tile's scores are [rows * heads, 64, keys], so memory is linear in the length. Serves every window, head dim and dtype, and
fewer queries than keys.
bf16 is computed in float32: without matrix units that costs nothing, and scores rounded to bf16 would double the error.

`python -m benchmarks.attention --backends` (docs/results/attention_cpu_backends.md), 4 heads of 64, two regions, against
three calls of torch's fused kernel (cpu_sdpa): bf16 80 against 105 ms at 256 tokens and 109 against 145 at 512; in float32
they are even up to 512 (117 against 114).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from model.attention.kernels.inputs import AttentionInputs, accumulation_dtype

TILE_ROWS = 64
"""Queries of a tile."""


@dataclass(frozen=True)
class _Tile:
    """Queries of tokens [start, end) with near keys [near_start, end) and far keys [0, far_end). Keys [near_start, near_edge)
    lie within the window of some of the queries only."""

    start: int
    end: int
    near_start: int
    far_end: int
    near_edge: int

    def near(self, window: int, group: int, device: torch.device) -> Tensor:
        """Pairs of the tile's queries and keys [near_start, near_edge) nearer than the window, bool [rows * group, keys]."""
        i = torch.arange(self.start, self.end, device=device).repeat_interleave(group)
        return i[:, None] - torch.arange(self.near_start, self.near_edge, device=device) < window

    def future(self, group: int, device: torch.device) -> Tensor:
        """Pairs of the tile's queries and keys whose key is later, bool [rows * group, rows]."""
        i = torch.arange(self.end - self.start, device=device)
        return i.repeat_interleave(group)[:, None] < i


def _tiles(first: int, end_of_row: int, window: int | None, far: bool) -> Iterator[_Tile]:
    """Tiles of the queries of tokens [first, end_of_row)."""
    for start in range(first, end_of_row, TILE_ROWS):
        end = min(start + TILE_ROWS, end_of_row)
        near_start = 0 if window is None else max(0, start - window + 1)
        near_edge = near_start if window is None else max(near_start, end - window)
        yield _Tile(start, end, near_start, near_edge if far and end > (window or 0) else 0, near_edge)


class _HeadsFirst:
    """Inputs with heads first: queries [B * k, C * group, H] (the group of a key head together), keys [B * k, S, H]."""

    def __init__(self, inputs: AttentionInputs):
        self.batch, self.length, self.kv_heads = inputs.v.shape[:3]
        self.first = self.length - inputs.queries  # token whose query there is
        self.group = inputs.near_q.shape[2] // self.kv_heads
        self.accumulation = accumulation_dtype(inputs.v.dtype)
        self.near_q, self.near_k, self.v = self.queries(inputs.near_q), self.keys(inputs.near_k), self.keys(inputs.v)
        self.far = inputs.far_q is not None and inputs.far_k is not None
        if inputs.far_q is not None and inputs.far_k is not None:
            self.far_q, self.far_k = self.queries(inputs.far_q), self.keys(inputs.far_k)

    def queries(self, x: Tensor) -> Tensor:
        x = x.to(self.accumulation).unflatten(2, (self.kv_heads, self.group)).transpose(1, 2)
        return x.reshape(self.batch * self.kv_heads, (self.length - self.first) * self.group, -1)

    def keys(self, x: Tensor) -> Tensor:
        return x.to(self.accumulation).transpose(1, 2).reshape(self.batch * self.kv_heads, self.length, -1)

    def unpack_queries(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Queries, outputs or gradients of them as [B, C, n, size]."""
        x = x.view(self.batch, self.kv_heads, self.length - self.first, self.group, -1).transpose(1, 2)
        return x.reshape(self.batch, self.length - self.first, self.kv_heads * self.group, -1).to(dtype)

    def unpack_keys(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Keys, values or gradients of them as [B, S, k, size]."""
        return x.view(self.batch, self.kv_heads, self.length, -1).transpose(1, 2).to(dtype)

    def of_tile(self, x: Tensor, tile: _Tile) -> Tensor:
        """The queries of a tile, or what is laid out as they are."""
        return x[:, (tile.start - self.first) * self.group : (tile.end - self.first) * self.group]

    def scores(self, tile: _Tile, window: int | None, scale: float) -> Tensor:
        """Scaled scores against keys [0, end) with far ones, else [near_start, end); -inf where a query does not see a key."""
        scores = self.of_tile(self.near_q, tile) @ self.near_k[:, tile.near_start : tile.end].transpose(1, 2)
        near = tile.near(window, self.group, scores.device) if window is not None and tile.near_edge > tile.near_start else None
        if tile.far_end:
            far = self.of_tile(self.far_q, tile) @ self.far_k[:, : tile.far_end].transpose(1, 2)
            if near is not None:
                mixed = scores[..., : tile.near_edge - tile.near_start]
                mixed.copy_(torch.where(near, mixed, far[..., tile.near_start :]))
            scores = torch.cat((far[..., : tile.near_start], scores), dim=-1)
        elif near is not None:
            scores[..., : tile.near_edge - tile.near_start].masked_fill_(~near, float("-inf"))
        scores[..., tile.start - tile.end :].masked_fill_(tile.future(self.group, scores.device), float("-inf"))
        return scores.mul_(scale)


def forward(inputs: AttentionInputs, scale: float, window: int | None) -> tuple[Tensor, Tensor]:
    """Output [B, C, n, Hv] and log-sum-exp [B, C, n]; arguments as model.attention.kernels.reference.reference_attention."""
    rows = _HeadsFirst(inputs)
    out = rows.v.new_empty(*rows.near_q.shape[:2], rows.v.shape[-1])
    lse = rows.v.new_empty(*rows.near_q.shape[:2], 1)
    for tile in _tiles(rows.first, rows.length, window, rows.far):
        p = rows.scores(tile, window, scale)
        largest = p.amax(dim=-1, keepdim=True)
        total = p.sub_(largest).exp_().sum(dim=-1, keepdim=True)
        rows.of_tile(out, tile).copy_(torch.bmm(p, rows.v[:, tile.end - p.shape[-1] : tile.end]).div_(total))
        rows.of_tile(lse, tile).copy_(total.log_().add_(largest))
    return rows.unpack_queries(out, inputs.v.dtype), rows.unpack_queries(lse, rows.accumulation)[..., 0]


def backward(
    grad: Tensor, inputs: AttentionInputs, out: Tensor, lse: Tensor, scale: float, window: int | None
) -> AttentionInputs:
    """Gradients from grad and out [B, C, n, Hv] and lse [B, C, n]."""
    rows = _HeadsFirst(inputs)
    grad_o = rows.queries(grad)
    dot = (grad_o * rows.queries(out)).sum(dim=-1, keepdim=True)
    lse = rows.queries(lse[..., None])
    d_near_q, d_near_k, d_v = (torch.zeros_like(x) for x in (rows.near_q, rows.near_k, rows.v))
    d_far_q, d_far_k = (torch.zeros_like(rows.far_q), torch.zeros_like(rows.far_k)) if rows.far else (None, None)
    for tile in _tiles(rows.first, rows.length, window, rows.far):
        p = rows.scores(tile, window, scale).sub_(rows.of_tile(lse, tile)).exp_()
        keys = slice(tile.end - p.shape[-1], tile.end)
        upstream = rows.of_tile(grad_o, tile)
        d_v[:, keys].baddbmm_(p.transpose(1, 2), upstream)
        d_scores = torch.bmm(upstream, rows.v[:, keys].transpose(1, 2)).sub_(rows.of_tile(dot, tile)).mul_(p).mul_(scale)
        if tile.far_end:
            assert d_far_q is not None and d_far_k is not None
            d_far = d_scores[..., : tile.far_end].contiguous()
            d_scores = d_scores[..., tile.near_start :].contiguous()
            if tile.near_edge > tile.near_start and window is not None:
                is_near = tile.near(window, rows.group, p.device)
                d_far[..., tile.near_start :].masked_fill_(is_near, 0.0)
                d_scores[..., : tile.near_edge - tile.near_start].masked_fill_(~is_near, 0.0)
            rows.of_tile(d_far_q, tile).copy_(torch.bmm(d_far, rows.far_k[:, : tile.far_end]))
            d_far_k[:, : tile.far_end].baddbmm_(d_far.transpose(1, 2), rows.of_tile(rows.far_q, tile))
        near_keys = slice(tile.near_start, tile.end)
        rows.of_tile(d_near_q, tile).copy_(torch.bmm(d_scores, rows.near_k[:, near_keys]))
        d_near_k[:, near_keys].baddbmm_(d_scores.transpose(1, 2), rows.of_tile(rows.near_q, tile))
    dtype = inputs.v.dtype
    near = rows.unpack_queries(d_near_q, dtype), rows.unpack_keys(d_near_k, dtype), rows.unpack_keys(d_v, dtype)
    if d_far_q is None or d_far_k is None:
        return AttentionInputs(*near)
    return AttentionInputs(*near, rows.unpack_queries(d_far_q, dtype), rows.unpack_keys(d_far_k, dtype))
