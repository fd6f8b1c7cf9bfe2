"""Attention of queries that see every key they are given: without a mask, without gradients, in memory linear in both.

It is what a chunk of a row has with the keys long before it (model/attention/row_cache.py).
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention.kernels.dispatch import BACKENDS
from model.attention.kernels.inputs import accumulation_dtype

aten = torch.ops.aten
SCORES = 1 << 25
"""Scores that the tiles of a GPU hold at once where no fused kernel serves (128 MiB in float32)."""


def attend_unmasked(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output [B, C, n, Hv] and natural log-sum-exp of the scaled scores [B, C, n].

    Args:
        q, k, v: rotated queries [B, C, n, H], keys [B, K, k, H] and values [B, K, k, Hv]; k divides n, and consecutive query
            heads share a key head.
        scale: multiplies the scores.
    """
    flash, width = BACKENDS["flash"], max(q.shape[-1], v.shape[-1])
    if q.device.type == "cpu":
        wide = (F.pad(x, (0, width - x.shape[-1])).transpose(1, 2) for x in (q, k, v))  # of one width only
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(*wide, 0.0, False, scale=scale)
        return out.transpose(1, 2)[..., : v.shape[-1]], lse.transpose(1, 2)
    fits = width % flash.head_dim_multiple == 0 and width <= (flash.max_head_dim or width)
    if fits and flash.dtypes is not None and q.dtype in flash.dtypes:
        wide = (F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
        lengths = (None, None, q.shape[1], k.shape[1])
        out, lse, *_ = aten._flash_attention_forward(*wide, *lengths, 0.0, False, False, scale=scale)
        return out[..., : v.shape[-1]], lse.transpose(1, 2)
    return tiled(q, k, v, scale)


def tiled(q: Tensor, k: Tensor, v: Tensor, scale: float, scores: int = SCORES) -> tuple[Tensor, Tensor]:
    """As `attend_unmasked`, by matrix products that hold about `scores` scores at once: for every device and dtype."""
    (B, C, n, _), wide = q.shape, accumulation_dtype(q.dtype)
    keys, values = (x.transpose(1, 2).to(wide) for x in (k, v))
    out, lse = v.new_empty(B, C, n, v.shape[-1]), v.new_empty(B, C, n, dtype=wide)
    for rows in _tiles(C, max(1, scores // (B * n * k.shape[1]))):
        queries = q[:, rows].to(wide).unflatten(2, (k.shape[2], -1)).permute(0, 2, 3, 1, 4)  # [B, k, group, tile, H]
        p = (queries.flatten(2, 3) @ keys.transpose(-1, -2)).mul_(scale)
        total = p.logsumexp(dim=-1, keepdim=True)
        result = (p.sub_(total).exp_() @ values).unflatten(2, queries.shape[2:4])
        out[:, rows] = result.permute(0, 3, 1, 2, 4).flatten(2, 3)
        lse[:, rows] = total.unflatten(2, queries.shape[2:4])[..., 0].permute(0, 3, 1, 2).flatten(2, 3)
    return out, lse


def _tiles(length: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, length, size))
