"""Attention over some of the keys, merged with attention over others."""

import torch
from torch import Tensor


def merge(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> None:
    """Merge the attention of other keys into (out [..., Hv], lse [...]) in place; out is in the dtype of lse."""
    total = torch.logaddexp(lse, other_lse)
    out.mul_((lse - total).exp_()[..., None]).add_(other_out * (other_lse - total).exp_()[..., None])
    lse.copy_(total)
