"""What attention is given, and its definition.

Layout [B, S, heads, size]. Pairs nearer than the window meet in (near_q, near_k), the others in (far_q, far_k).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.positions import Documents


@dataclass(frozen=True)
class Heads:
    """Rotated queries and keys, and values, of one layer; or the gradients of them.

    near_q, far_q: [B, S, n, H]; near_k, far_k: [B, S, k, H]; v: [B, S, k, Hv], where k divides n and consecutive query
    heads share a key head. far_q and far_k are None where one region suffices.
    """

    near_q: Tensor
    near_k: Tensor
    v: Tensor
    far_q: Tensor | None = None
    far_k: Tensor | None = None

    def near(self) -> "Heads":
        """The near region alone."""
        return Heads(self.near_q, self.near_k, self.v)

    def part(self, rows: slice, tokens: slice) -> "Heads":
        """Some rows and tokens."""
        near_q, near_k, v, far_q, far_k = (None if x is None else x[rows, tokens] for x in self.tensors())
        assert near_q is not None and near_k is not None and v is not None
        return Heads(near_q, near_k, v, far_q, far_k)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All five, in the order of the fields."""
        return self.near_q, self.near_k, self.v, self.far_q, self.far_k


def documents_of(documents: Documents, batch: int, sequence: int) -> Tensor:
    """The number of each token's document, int64 [B, S]."""
    flat = torch.arange(batch * sequence, device=documents.boundaries.device)
    return torch.searchsorted(documents.boundaries.long(), flat, right=True).view(batch, sequence)


def reference(
    heads: Heads, scale: float, window: int | None = None, documents: Documents | None = None
) -> tuple[Tensor, Tensor]:
    """Attention by its definition, with whole matrices of scores; differentiable in any dtype.

    Args:
        heads: what attends.
        scale: multiplies the scores.
        window: with far parts, the distance where they take over; without them, the tokens seen, itself included.
        documents: attention stays inside them.

    Returns:
        Output [B, S, n, Hv] and natural log-sum-exp of the scaled scores [B, S, n].
    """
    B, S, n, _ = heads.near_q.shape
    group = n // heads.near_k.shape[2]
    place = torch.arange(S, device=heads.v.device)
    distance = place[:, None] - place
    scores, seen = _scores(heads.near_q, heads.near_k, group), distance >= 0
    if heads.far_q is not None and heads.far_k is not None:
        assert window is not None
        scores = torch.where(distance < window, scores, _scores(heads.far_q, heads.far_k, group))
    elif window is not None:
        seen = seen & (distance < window)
    if documents is not None:
        document = documents_of(documents, B, S)[:, None]
        seen = seen & (document[..., :, None] == document[..., None, :])
    scores = (scores * scale).masked_fill(~seen, float("-inf"))
    out = scores.softmax(dim=-1) @ heads.v.transpose(1, 2).repeat_interleave(group, dim=1)
    return out.transpose(1, 2), scores.logsumexp(dim=-1).transpose(1, 2)


def _scores(q: Tensor, k: Tensor, group: int) -> Tensor:
    return q.transpose(1, 2) @ k.transpose(1, 2).repeat_interleave(group, dim=1).transpose(-1, -2)
