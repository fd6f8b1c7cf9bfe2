"""Packed documents: several in one row, attention inside each."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class PackedDocuments:
    """Where packed documents begin and end in the T = B * S flattened tokens."""

    boundaries: Tensor
    """int32 [documents + 1] on the device: 0, ..., T."""
    far_queries: Tensor | None = None
    """int64 indices of the tokens with at least `window` tokens of their own document before them."""
    far_keys: Tensor | None = None
    """int64 indices of the tokens that those see beyond the window; as many, document by document."""
    far_boundaries: Tensor | None = None
    """int32: boundaries of those two lists by document."""

    def mark_dynamic(self) -> None:
        """Tell torch.compile that the lengths of these lists vary. Otherwise it compiles code for the first batch's lengths,
        and a run that resumes compiles it for those of another batch, with other bits."""
        for x in (self.boundaries, self.far_queries, self.far_keys, self.far_boundaries):
            if x is not None:
                mark_length_dynamic(x)

    def to(self, device: torch.device) -> "PackedDocuments":
        """These, on the device; the host does not wait for the copy."""

        def moved(x: Tensor | None) -> Tensor | None:
            pinned = x.pin_memory() if x is not None and device.type == "cuda" and not x.is_cuda else x
            return None if pinned is None else pinned.to(device, non_blocking=True)

        lists = (moved(x) for x in (self.far_queries, self.far_keys, self.far_boundaries))
        return PackedDocuments(moved(self.boundaries), *lists)  # type: ignore[arg-type]


def mark_length_dynamic(x: Tensor) -> None:
    """Mark dimension 0 as varying from call to call. Unlike the public torch._dynamo.mark_dynamic, this torch-private form
    permits the compiler to specialise all the same instead of failing."""
    torch._dynamo.maybe_mark_dynamic(x, 0)


def document_of_tokens(boundaries: Tensor, tokens: int) -> Tensor:
    """Index of the document of each of the flattened tokens, int64 [T]."""
    flat = torch.arange(tokens, device=boundaries.device)
    return torch.searchsorted(boundaries.long(), flat, right=True) - 1


def pack_documents(boundaries: Tensor, window: int | None, lists: bool) -> PackedDocuments:
    """Documents from their boundaries.

    Args:
        boundaries: [documents + 1] over the flattened tokens.
        window: tokens of the near region, None = one region.
        lists: make the lists of far queries and keys too, by which kernels for packed tokens gather.
    """
    boundaries = boundaries.to(torch.int32)
    if window is None or not lists:
        return PackedDocuments(boundaries)
    starts, ends = boundaries[:-1].long(), boundaries[1:].long()
    flat = torch.arange(int(boundaries[-1]), device=boundaries.device)
    document = document_of_tokens(boundaries, len(flat))
    far_lengths = (ends - starts - window).clamp(min=0)
    return PackedDocuments(
        boundaries,
        far_queries=flat[flat - starts[document] >= window],
        far_keys=flat[flat + window < ends[document]],
        far_boundaries=pad(far_lengths.cumsum(0), (1, 0)).to(torch.int32),
    )
