"""Two regions, sliding windows and packed documents on a CPU, where model/attention/kernels/cpu_flash.py does not serve.

Each document is computed alone, and so are a few whole rows at a time, by model/attention/kernels/cpu_tiled.py or, above its
limit, by torch's kernel (model/attention/kernels/three_calls.py).
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from model.attention.kernels import cpu_tiled, dispatch, three_calls
from model.attention.kernels.cpu_sdpa import CpuSdpa
from model.attention.kernels.inputs import AttentionInputs, accumulation_dtype
from model.positions.packing import PackedDocuments

TILED_ELEMENTS = 1 << 19
"""Scores that one call of cpu_tiled holds at once (2 MiB in float32): about what stays in a core's cache."""

RowsAndTokens = tuple[slice, slice]
"""A part of a batch: indices into the first two dimensions of tensors [B, S, ...]."""


def forward(
    inputs: AttentionInputs, scale: float, window: int | None, documents: PackedDocuments | None
) -> tuple[Tensor, Tensor]:
    """Output [B, S, n, Hv] and log-sum-exp [B, S, n]; arguments as model.attention.kernels.reference.reference_attention."""
    B, S, n, _ = inputs.near_q.shape
    if documents is None and not _is_tiled(S):
        return three_calls.forward(CpuSdpa(), inputs, scale, window)
    out = inputs.v.new_empty(B, S, n, inputs.v.shape[-1])
    lse = inputs.v.new_empty(B, S, n, dtype=accumulation_dtype(inputs.v.dtype))
    for part in _self_contained_parts(inputs, documents):
        part_inputs, part_window = _inputs_of_part(inputs, part, window)
        if _is_tiled(part_inputs.v.shape[1]):
            out[part], lse[part] = cpu_tiled.forward(part_inputs, scale, part_window)
        else:
            out[part], lse[part] = three_calls.forward(CpuSdpa(), part_inputs, scale, part_window)
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
    """Gradients from grad and out [B, S, n, Hv] and lse [B, S, n]."""
    if documents is None and not _is_tiled(inputs.v.shape[1]):
        return three_calls.backward(CpuSdpa(), grad, inputs, out, lse, scale, window)
    gradients = inputs.map(torch.zeros_like)
    for part in _self_contained_parts(inputs, documents):
        part_inputs, part_window = _inputs_of_part(inputs, part, window)
        if _is_tiled(part_inputs.v.shape[1]):
            part_gradients = cpu_tiled.backward(grad[part], part_inputs, out[part], lse[part], scale, part_window)
        else:
            part_gradients = three_calls.backward(CpuSdpa(), grad[part], part_inputs, out[part], lse[part], scale, part_window)
        for gradient, part_gradient in zip(gradients.tensors(), part_gradients.tensors(), strict=False):
            gradient[part] = part_gradient
    return gradients


def _is_tiled(tokens: int) -> bool:
    """Whether a row or document of so many tokens is computed by cpu_tiled."""
    return dispatch.cpu_eager_backend(tokens) == "cpu_tiled"


def _self_contained_parts(inputs: AttentionInputs, documents: PackedDocuments | None) -> Iterator[RowsAndTokens]:
    """Everything that attends to itself alone: documents, or some rows at a time."""
    B, S, n = inputs.near_q.shape[:3]
    if documents is None:
        rows = max(1, TILED_ELEMENTS // (n * cpu_tiled.TILE_ROWS * S))
        yield from ((slice(row, row + rows), slice(0, S)) for row in range(0, B, rows))
        return
    for start, end in pairwise(documents.boundaries.tolist()):
        if end > start:
            yield slice(start // S, start // S + 1), slice(start % S, start % S + end - start)


def _inputs_of_part(inputs: AttentionInputs, part: RowsAndTokens, window: int | None) -> tuple[AttentionInputs, int | None]:
    """The inputs of a part, and its window: a part within the window has one region."""
    part_inputs = inputs.map(lambda x: x[part])
    if window is not None and window >= part_inputs.v.shape[1]:
        return part_inputs.near(), None
    return part_inputs, window
