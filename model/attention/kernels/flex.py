"""Two regions with FlexAttention: on a GPU, for dtypes and head dims that its fused kernels do not take (float32, above 256),
and where `FASTEST` of model/attention/kernels/dispatch.py names it.

Its log-sum-exp carries gradients, so autograd differentiates the merge of the regions. It has no backward on a CPU.
"""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from model.attention.kernels.inputs import AttentionInputs, document_ids
from model.positions.packing import PackedDocuments


def flex_attend(inputs: AttentionInputs, scale: float, window: int | None, documents: PackedDocuments | None) -> Tensor:
    """Attention [B, C, n, Hv]; arguments as model.attention.kernels.reference.reference_attention."""
    return flex_attend_with_lse(inputs, scale, window, documents)[0]


def flex_attend_with_lse(
    inputs: AttentionInputs, scale: float, window: int | None, documents: PackedDocuments | None
) -> tuple[Tensor, Tensor]:
    """The same and the natural log-sum-exp of the scaled scores [B, C, n]."""
    B, C, S = inputs.v.shape[0], inputs.queries, inputs.tokens
    document = None if documents is None else document_ids(documents, B, S)
    query_document = None if document is None else document[:, S - C :]
    out, lse = _region(inputs.near_q, inputs.near_k, inputs.v, scale, window, query_document, document)
    if inputs.far_q is not None and inputs.far_k is not None and window is not None and window < S:
        first = max(0, window - (S - C))  # of the queries that have far keys
        queries, keys = slice(first, None), slice(0, S - window)
        split = (None, None)
        if query_document is not None and document is not None:
            split = query_document[:, queries], document[:, keys]
        far, far_lse = _region(inputs.far_q[:, queries], inputs.far_k[:, keys], inputs.v[:, keys], scale, None, *split)
        near, near_lse = out[:, queries], lse[:, queries]
        total = torch.logaddexp(near_lse, far_lse)  # a row without far keys has far_lse = -inf and weight 0
        merged = near * (near_lse - total).exp()[..., None] + far * (far_lse - total).exp()[..., None]
        out = torch.cat((out[:, :first], merged.to(out.dtype)), dim=1)
        lse = torch.cat((lse[:, :first], total), dim=1)
    return out, lse


def _region(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int | None,
    q_document: Tensor | None,
    k_document: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Causal attention within `window` tokens and one document: output and log-sum-exp, heads last. The last query and the
    last key are one token."""
    queries, keys = q.shape[1], k.shape[1]
    earlier = keys - queries

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        distance = i + earlier - j
        allowed = distance >= 0
        if window is not None:
            allowed = allowed & (distance < window)
        if q_document is not None and k_document is not None:
            allowed = allowed & (q_document[b, i] == k_document[b, j])
        return allowed

    batch = None if q_document is None else q.shape[0]  # without documents the mask is that of every row
    mask = create_block_mask(visible, batch, None, queries, keys, device=str(q.device))
    kernel = torch.compile(flex_attention, dynamic=False) if q.is_cuda else flex_attention
    out, aux = kernel(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), block_mask=mask, scale=scale,
        enable_gqa=q.shape[2] != k.shape[2], return_aux=AuxRequest(lse=True),
    )  # fmt: skip
    assert aux.lse is not None
    return out.transpose(1, 2), aux.lse.transpose(1, 2)
