"""Whole rows with one region: torch's scaled_dot_product_attention, which chooses a fused kernel itself."""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention.kernels.inputs import AttentionInputs


def sdpa_attention(inputs: AttentionInputs, scale: float) -> Tensor:
    """Causal attention [B, S, n, Hv] over whole rows in one region, differentiated by torch."""
    q_BnSH, k_BkSH, v_BkSH = (x.transpose(1, 2) for x in (inputs.near_q, inputs.near_k, inputs.v))
    value_head_dim = v_BkSH.shape[-1]
    if value_head_dim != q_BnSH.shape[-1] and not q_BnSH.is_cuda:
        # torch's CPU kernel takes values as wide as keys only; else torch would hold an S x S matrix
        v_BkSH = F.pad(v_BkSH, (0, q_BnSH.shape[-1] - value_head_dim))
    group = q_BnSH.shape[1] // k_BkSH.shape[1]
    if group > 1 and not _takes_grouped_heads(v_BkSH):
        k_BkSH, v_BkSH, group = k_BkSH.repeat_interleave(group, 1), v_BkSH.repeat_interleave(group, 1), 1
    out_BnSH = F.scaled_dot_product_attention(q_BnSH, k_BkSH, v_BkSH, is_causal=True, scale=scale, enable_gqa=group > 1)
    return out_BnSH[..., :value_head_dim].transpose(1, 2)


def _takes_grouped_heads(v: Tensor) -> bool:
    """Whether torch has a fused kernel for fewer key heads than query heads. In float32 on a GPU it has none, and would
    hold the S x S scores instead."""
    return not (v.is_cuda and v.dtype == torch.float32)
