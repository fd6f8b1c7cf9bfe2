"""What every attention kernel takes: rotated queries and keys, and values; and where packed documents lie in them.

Suffixes name dimensions: B batch, S sequence, n query heads and k key heads of this rank, H head dim, T = B * S.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from model.positions.packing import PackedDocuments, document_of_tokens


@dataclass(frozen=True)
class AttentionInputs:
    """Rotated queries and keys, and values, of one layer; or the gradients of them.

    near_q, far_q: [B, S, n, H]; near_k, far_k: [B, S, k, H]; v: [B, S, k, Hv], where k divides n and consecutive query
    heads share a key head. Pairs nearer than the window meet in (near_q, near_k), the others in (far_q, far_k), which are
    None where one region suffices.
    """

    near_q: Tensor
    near_k: Tensor
    v: Tensor
    far_q: Tensor | None = None
    far_k: Tensor | None = None

    def near(self) -> "AttentionInputs":
        """The near region alone."""
        return AttentionInputs(self.near_q, self.near_k, self.v)

    def tensors(self) -> list[Tensor]:
        """The three tensors of one region or the five of two, in the order of the fields: the inverse of the constructor."""
        return [x for x in (self.near_q, self.near_k, self.v, self.far_q, self.far_k) if x is not None]

    def map(self, function: Callable[[Tensor], Tensor]) -> "AttentionInputs":
        """The function's result for each tensor."""
        return AttentionInputs(*(function(x) for x in self.tensors()))


def document_ids(documents: PackedDocuments, batch: int, sequence: int) -> Tensor:
    """The number of each token's document, from 1, int64 [B, S]."""
    return document_of_tokens(documents.boundaries, batch * sequence).view(batch, sequence) + 1


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of softmax and of log-sum-exps for tensors of a dtype: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
