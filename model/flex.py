"""Two regions with FlexAttention: for dtypes and heads that a GPU's fused kernels do not take (float32, very wide heads), and
where the table of model/dispatch.py has it.

Its log-sum-exp carries gradients, so the two parts are merged by autograd. It has no backward on a CPU.
"""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from model.heads import Heads, documents_of
from model.positions import Documents


def attend(heads: Heads, scale: float, window: int | None, documents: Documents | None) -> Tensor:
    """Attention [B, S, n, Hv]; arguments as model.heads.reference."""
    B, S = heads.v.shape[:2]
    document = None if documents is None else documents_of(documents, B, S)
    out, lse = _region(heads.near_q, heads.near_k, heads.v, scale, window, document, document)
    if heads.far_q is not None and heads.far_k is not None:
        assert window is not None
        rows, keys = slice(window, None), slice(0, S - window)
        split = (None, None) if document is None else (document[:, rows], document[:, keys])
        far, far_lse = _region(heads.far_q[:, rows], heads.far_k[:, keys], heads.v[:, keys], scale, None, *split)
        near, near_lse = out[:, rows], lse[:, rows]
        total = torch.logaddexp(near_lse, far_lse)  # a row without far keys has far_lse = -inf and weight 0
        merged = near * (near_lse - total).exp()[..., None] + far * (far_lse - total).exp()[..., None]
        out = torch.cat((out[:, :window], merged.to(out.dtype)), dim=1)
    return out


def _region(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, of_query: Tensor | None, of_key: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Causal attention within `window` tokens and one document: output and log-sum-exp, heads last."""

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        allowed = i >= j
        if window is not None:
            allowed = allowed & (i - j < window)
        if of_query is not None and of_key is not None:
            allowed = allowed & (of_query[b, i] == of_key[b, j])
        return allowed

    length = q.shape[1]
    rows = None if of_query is None else q.shape[0]
    mask = create_block_mask(seen, rows, None, length, length, device=str(q.device))
    kernel = torch.compile(flex_attention, dynamic=False) if q.is_cuda else flex_attention
    out, aux = kernel(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), block_mask=mask, scale=scale,
        enable_gqa=q.shape[2] != k.shape[2], return_aux=AuxRequest(lse=True),
    )  # fmt: skip
    assert aux.lse is not None
    return out.transpose(1, 2), aux.lse.transpose(1, 2)
