"""Two regions, sliding windows and packed documents on a CPU, where model/attention/kernels/cpu_flash.py does not serve.

Each document is computed alone, and so are a few whole rows at a time, by model/attention/kernels/cpu_tiled.py or, above its
limit, by torch's kernel (model/attention/kernels/three_calls.py), which takes as many queries as keys only.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from model.attention.kernels import cpu_tiled, dispatch, three_calls
from model.attention.kernels.cpu_sdpa import CpuSdpa
from model.attention.kernels.inputs import AttentionInputs, accumulation_dtype, boundaries_on_host
from model.positions.packing import PackedDocuments

TILED_ELEMENTS = 1 << 19
"""Scores that one call of cpu_tiled holds at once (2 MiB in float32): about what stays in a core's cache."""

RowsAndTokens = tuple[slice, slice, slice]
"""A part of a batch: rows, and of each of them queries and keys."""


def forward(
    inputs: AttentionInputs, scale: float, window: int | None, documents: PackedDocuments | None
) -> tuple[Tensor, Tensor]:
    """Output [B, C, n, Hv] and log-sum-exp [B, C, n]; arguments as model.attention.kernels.reference.reference_attention."""
    B, C, n, _ = inputs.near_q.shape
    if documents is None and not _is_tiled(inputs):
        return three_calls.forward(CpuSdpa(), inputs, scale, window)
    out = inputs.v.new_empty(B, C, n, inputs.v.shape[-1])
    lse = inputs.v.new_empty(B, C, n, dtype=accumulation_dtype(inputs.v.dtype))
    for part in _self_contained_parts(inputs, documents):
        part_inputs, part_window = _inputs_of_part(inputs, part, window)
        queries = part[:2]
        if _is_tiled(part_inputs):
            out[queries], lse[queries] = cpu_tiled.forward(part_inputs, scale, part_window)
        else:
            out[queries], lse[queries] = three_calls.forward(CpuSdpa(), part_inputs, scale, part_window)
    return out, lse


def backward(
    grad: Tensor,
    inputs: AttentionInputs,
    out: Tensor,
    lse: Tensor,
    scale: float,
    window: int | None,
    documents: PackedDocuments | None,
) -> AttentionInputs:
    """Gradients from grad and out [B, C, n, Hv] and lse [B, C, n]."""
    if documents is None and not _is_tiled(inputs):
        return three_calls.backward(CpuSdpa(), grad, inputs, out, lse, scale, window)
    gradients = inputs.map(torch.zeros_like)
    for part in _self_contained_parts(inputs, documents):
        part_inputs, part_window = _inputs_of_part(inputs, part, window)
        part_grad, part_out, part_lse = (x[part[:2]] for x in (grad, out, lse))
        if _is_tiled(part_inputs):
            part_gradients = cpu_tiled.backward(part_grad, part_inputs, part_out, part_lse, scale, part_window)
        else:
            part_gradients = three_calls.backward(CpuSdpa(), part_grad, part_inputs, part_out, part_lse, scale, part_window)
        for gradient, part_gradient in zip(gradients.part(*part).tensors(), part_gradients.tensors(), strict=False):
            gradient.copy_(part_gradient)
    return gradients


def _is_tiled(inputs: AttentionInputs) -> bool:
    """Whether rows or a document are computed by cpu_tiled."""
    return dispatch.cpu_eager_backend(inputs.queries, inputs.tokens) == "cpu_tiled"


def _self_contained_parts(inputs: AttentionInputs, documents: PackedDocuments | None) -> Iterator[RowsAndTokens]:
    """Everything that attends to itself alone: documents with queries, or some rows at a time."""
    (B, C, n), S = inputs.near_q.shape[:3], inputs.tokens
    if documents is None:
        rows = max(1, TILED_ELEMENTS // (n * cpu_tiled.TILE_ROWS * S))
        yield from ((slice(row, row + rows), slice(0, C), slice(0, S)) for row in range(0, B, rows))
        return
    spans = (pairwise(boundaries) for boundaries in boundaries_on_host(inputs, documents))
    for (query, query_end), (start, end) in zip(*spans, strict=True):
        if query_end > query:
            queries, keys = slice(query % C, query % C + query_end - query), slice(start % S, start % S + end - start)
            yield slice(start // S, start // S + 1), queries, keys


def _inputs_of_part(inputs: AttentionInputs, part: RowsAndTokens, window: int | None) -> tuple[AttentionInputs, int | None]:
    """The inputs of a part, and its window: a part within the window has one region."""
    part_inputs = inputs.part(*part)
    if window is not None and window >= part_inputs.tokens:
        return part_inputs.near(), None
    return part_inputs, window
