"""What every attention kernel takes: rotated queries and keys, and values; and where packed documents lie in them.

Suffixes name dimensions: B batch, S tokens of a row, C the last of them that are queries (all, or the latest chunk of a
longer row), n query heads and k key heads of this rank, H head dim, T = B * S.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from model.positions.packing import PackedDocuments, document_of_tokens


@dataclass(frozen=True)
class AttentionInputs:
    """Rotated queries and keys, and values, of one layer; or the gradients of them.

    near_q, far_q: [B, C, n, H]; near_k, far_k: [B, S, k, H]; v: [B, S, k, Hv], where k divides n and consecutive query
    heads share a key head. Query c is token S - C + c of its row. Pairs nearer than the window meet in (near_q, near_k), the
    others in (far_q, far_k), which are None where one region suffices.
    """

    near_q: Tensor
    near_k: Tensor
    v: Tensor
    far_q: Tensor | None = None
    far_k: Tensor | None = None

    @property
    def queries(self) -> int:
        """Tokens of a row that are queries, its last ones: C."""
        return self.near_q.shape[1]

    @property
    def tokens(self) -> int:
        """Tokens of a row, all of which are keys: S."""
        return self.v.shape[1]

    def near(self) -> "AttentionInputs":
        """The near region alone."""
        return AttentionInputs(self.near_q, self.near_k, self.v)

    def tensors(self) -> list[Tensor]:
        """The three tensors of one region or the five of two, in the order of the fields: the inverse of the constructor."""
        return [x for x in (self.near_q, self.near_k, self.v, self.far_q, self.far_k) if x is not None]

    def map(self, function: Callable[[Tensor], Tensor]) -> "AttentionInputs":
        """The function's result for each tensor."""
        return AttentionInputs(*(function(x) for x in self.tensors()))

    def part(self, rows: slice, queries: slice, keys: slice) -> "AttentionInputs":
        """Views of some queries and some keys of some rows."""
        near = self.near_q[rows, queries], self.near_k[rows, keys], self.v[rows, keys]
        if self.far_q is None or self.far_k is None:
            return AttentionInputs(*near)
        return AttentionInputs(*near, self.far_q[rows, queries], self.far_k[rows, keys])


@dataclass(frozen=True)
class KeysAndValues:
    """Rotated keys and the values of consecutive tokens: near_k, far_k [B, tokens, k, H], v [B, tokens, k, Hv]."""

    near_k: Tensor
    v: Tensor
    far_k: Tensor | None = None

    @property
    def tokens(self) -> int:
        """How many."""
        return self.v.shape[1]

    def before(self, end: int) -> "KeysAndValues":
        """Those of the first `end` tokens, views."""
        return self if end == self.tokens else self._each(lambda x: x[:, :end])

    def followed_by(self, later: "KeysAndValues") -> "KeysAndValues":
        """These and those of the tokens after them."""
        far_k = None if self.far_k is None or later.far_k is None else torch.cat((self.far_k, later.far_k), dim=1)
        return KeysAndValues(torch.cat((self.near_k, later.near_k), dim=1), torch.cat((self.v, later.v), dim=1), far_k)

    def _each(self, function: Callable[[Tensor], Tensor]) -> "KeysAndValues":
        return KeysAndValues(function(self.near_k), function(self.v), None if self.far_k is None else function(self.far_k))


def document_ids(documents: PackedDocuments, batch: int, sequence: int) -> Tensor:
    """The number of each token's document, from 1, int64 [B, S]."""
    return document_of_tokens(documents.boundaries, batch * sequence).view(batch, sequence) + 1


def boundaries_on_host(inputs: AttentionInputs, documents: PackedDocuments | None) -> tuple[list[int], list[int]]:
    """Where what attends to itself alone begins and ends, rows or documents: in the flattened queries, and in the flattened
    keys.

    Raises:
        ValueError: the documents are those of other lengths.
    """
    B, C, S = inputs.v.shape[0], inputs.queries, inputs.tokens
    if documents is None:
        return [C * row for row in range(B + 1)], [S * row for row in range(B + 1)]
    queries, keys = documents.query_boundaries.tolist(), documents.boundaries.tolist()
    if (queries[-1], keys[-1]) != (B * C, B * S):
        raise ValueError(
            f"attention got documents of {queries[-1]} queries and {keys[-1]} keys, and wanted those of {B} x {C} queries and "
            f"{B} x {S} keys; pass model.positions.packing.pack_documents the tokens of a row and how many are queries"
        )
    return queries, keys


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of softmax and of log-sum-exps for tensors of a dtype: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
