"""Packed documents: several in one row, attention inside each."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class PackedDocuments:
    """Where packed documents begin and end. All S tokens of a row are keys, and its last C are queries.

    Where C = S, the boundaries of queries and of keys are the same tensor.
    """

    boundaries: Tensor
    """int32 [documents + 1] on the device: 0, ..., B * S, in the flattened keys; the starts of the rows are among them."""
    query_boundaries: Tensor
    """int32 [documents + 1]: 0, ..., B * C, the same documents in the flattened queries. Those that end before the first
    query of their row have none."""
    far_queries: Tensor | None = None
    """int64 indices of the queries with at least `window` tokens of their own document before them."""
    far_keys: Tensor | None = None
    """int64 indices of the keys that those see beyond the window."""
    far_boundaries: Tensor | None = None
    """int32 [documents + 1]: boundaries of `far_queries` by document."""
    far_key_boundaries: Tensor | None = None
    """int32 [documents + 1]: boundaries of `far_keys` by document."""

    def tensors(self) -> list[Tensor]:
        """The two tensors of one region or the six of two, in the order of the fields: the inverse of the constructor."""
        return [x for x in (getattr(self, field.name) for field in fields(self)) if x is not None]

    def mark_dynamic(self) -> None:
        """Tell torch.compile that the lengths of these lists vary. Otherwise it compiles code for the first batch's lengths,
        and a run that resumes compiles it for those of another batch, with other bits."""
        for x in self.tensors():
            mark_length_dynamic(x)

    def to(self, device: torch.device) -> "PackedDocuments":
        """These, on the device; the host does not wait for the copy. What is one tensor stays one."""
        copies = {id(x): copy_to(device, x) for x in {id(x): x for x in self.tensors()}.values()}
        return PackedDocuments(*(copies[id(x)] for x in self.tensors()))


def copy_to(device: torch.device, x: Tensor) -> Tensor:
    """x on the device; the host does not wait for the copy."""
    pinned = x.pin_memory() if device.type == "cuda" and not x.is_cuda else x
    return pinned.to(device, non_blocking=True)


def mark_length_dynamic(x: Tensor) -> None:
    """Mark dimension 0 as varying from call to call. Unlike the public torch._dynamo.mark_dynamic, this torch-private form
    permits the compiler to specialise all the same instead of failing."""
    torch._dynamo.maybe_mark_dynamic(x, 0)


def document_of_tokens(boundaries: Tensor, tokens: int) -> Tensor:
    """Index of the document of each of the flattened tokens, int64 [T]."""
    flat = torch.arange(tokens, device=boundaries.device)
    return torch.searchsorted(boundaries.long(), flat, right=True) - 1


def documents_before(boundaries: Tensor, row: int, end: int) -> Tensor:
    """Boundaries of documents where each row is cut short.

    Args:
        boundaries: [documents + 1] over the flattened tokens, the starts of the rows among them.
        row: tokens of a row, as it is.
        end: tokens of a row that stay. Documents beyond them are dropped, and the one that they cut ends with them.

    Returns:
        int32 [remaining documents + 1] over the flattened tokens of rows of `end` tokens.
    """
    kept = boundaries[boundaries % row < end]
    return (kept // row * end + kept % row).to(torch.int32)


def documents_between(boundaries: Tensor, row: int, start: int, end: int) -> Tensor:
    """Boundaries of documents in the tokens [start, end) of each row.

    Args:
        boundaries: [documents + 1] over the flattened tokens, the starts of the rows among them.
        row: tokens of a row, as it is.

    Returns:
        int32 [documents with tokens there + 1] over the flattened tokens of rows of end - start tokens.
    """
    length = end - start
    rows = torch.arange(int(boundaries[-1]) // row + 1, device=boundaries.device) * length
    inside = boundaries[(boundaries % row > start) & (boundaries % row < end)]
    return torch.cat((rows, inside // row * length + inside % row - start)).unique().to(torch.int32)


def pack_documents(
    boundaries: Tensor, window: int | None, lists: bool, *, keys: int | None = None, queries: int | None = None
) -> PackedDocuments:
    """Documents from their boundaries.

    Args:
        boundaries: [documents + 1] over the flattened tokens, the starts of the rows among them.
        window: tokens of the near region, None = one region.
        lists: make the lists of far queries and keys too, by which kernels for packed tokens gather.
        keys: tokens of a row, needed where not all of them are queries.
        queries: how many tokens at the end of each row are queries, None = all.
    """
    boundaries = query_boundaries = boundaries.to(torch.int32)
    flat = tokens = torch.arange(int(boundaries[-1]) if lists else 0, device=boundaries.device)
    if keys is not None and queries is not None and queries < keys:
        first = keys - queries
        query_boundaries = boundaries // keys * queries + (boundaries % keys - first).clamp(min=0)
        tokens = flat[flat % keys >= first]
    if window is None or not lists:
        return PackedDocuments(boundaries, query_boundaries)
    starts, ends, query_lengths = boundaries[:-1].long(), boundaries[1:].long(), query_boundaries.diff().long()
    far_lengths = (ends - starts - window).clamp(min=0) * (query_lengths > 0)
    document = document_of_tokens(boundaries, len(flat))
    far_key_boundaries = _boundaries_of(far_lengths)
    return PackedDocuments(
        boundaries,
        query_boundaries,
        far_queries=(tokens - starts[document[tokens]] >= window).nonzero()[:, 0],
        far_keys=flat[flat - starts[document] < far_lengths[document]],
        far_boundaries=far_key_boundaries if tokens is flat else _boundaries_of(far_lengths.minimum(query_lengths)),
        far_key_boundaries=far_key_boundaries,
    )


def _boundaries_of(lengths: Tensor) -> Tensor:
    """int32 [documents + 1], from the lengths [documents]."""
    return pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
