"""Causal attention as a function of rotated queries and keys, on one face for every position map and device.

Layout [B, S, heads, size]. Distances r = i - j below `window` meet in (near_q, near_k), the others in (far_q, far_k).
`reference` is the definition, with a matrix of scores; `attend` gives the same numbers.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.positions import Documents


@dataclass(frozen=True)
class Heads:
    """Rotated queries and keys, and values, of one layer.

    near_q, far_q: [B, S, n, H]; near_k, far_k: [B, S, k, H]; v: [B, S, k, Hv], where k divides n and consecutive query
    heads share a key head. far_q and far_k are None where one region suffices.
    """

    near_q: Tensor
    near_k: Tensor
    v: Tensor
    far_q: Tensor | None = None
    far_k: Tensor | None = None


def reference(
    heads: Heads, scale: float, window: int | None = None, documents: Documents | None = None
) -> tuple[Tensor, Tensor]:
    """Attention by its definition: output [B, S, n, Hv] and log-sum-exp [B, n, S]. Differentiable in any dtype.

    Args:
        window: without far parts, tokens seen (itself included); with them, the distance where they take over.
    """
    B, S, n, _ = heads.near_q.shape
    group = n // heads.near_k.shape[2]
    distance = torch.arange(S, device=heads.v.device)[:, None] - torch.arange(S, device=heads.v.device)
    scores = _scores(heads.near_q, heads.near_k, group)
    seen = distance >= 0
    if heads.far_q is not None and heads.far_k is not None:
        scores = torch.where(distance < window, scores, _scores(heads.far_q, heads.far_k, group))
    elif window is not None:
        seen = seen & (distance < window)
    if documents is not None:
        flat = torch.arange(B * S, device=heads.v.device)
        document = torch.searchsorted(documents.boundaries.long(), flat, right=True).view(B, 1, S)
        seen = seen & (document[..., :, None] == document[..., None, :])
    scores = (scores * scale).masked_fill(~seen, float("-inf"))
    out = scores.softmax(dim=-1) @ heads.v.transpose(1, 2).repeat_interleave(group, dim=1)
    return out.transpose(1, 2), scores.logsumexp(dim=-1)


def _scores(q: Tensor, k: Tensor, group: int) -> Tensor:
    return q.transpose(1, 2) @ k.transpose(1, 2).repeat_interleave(group, dim=1).transpose(-1, -2)


def attend(heads: Heads, scale: float, window: int | None = None, documents: Documents | None = None) -> Tensor:
    """Causal attention [B, S, n, Hv]; arguments as `reference`."""
    if window is None and documents is None:
        return plain(heads, scale)
    return reference(heads, scale, window, documents)[0]


def plain(heads: Heads, scale: float) -> Tensor:
    """One causal region over whole sequences: torch's own kernels."""
    q, k, v = (x.transpose(1, 2) for x in (heads.near_q, heads.near_k, heads.v))
    width = v.shape[-1]
    if width != q.shape[-1] and not q.is_cuda:
        v = F.pad(v, (0, q.shape[-1] - width))  # torch's CPU kernel wants equal widths, else it forms an S x S matrix
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    return out[..., :width].transpose(1, 2)
