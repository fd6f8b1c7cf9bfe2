"""cuDNN's fused attention, as a causal kernel that returns its log-sum-exp."""

import torch
from torch import Tensor

from model.attention.kernels.three_calls import aten, swap_tokens_and_heads


class Cudnn:
    """cuDNN's fused attention, the fastest on Hopper. It takes several query heads to a key head, and narrower values."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """As `CausalKernel`."""
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(
            *swap_tokens_and_heads(q, k, v), None, True, 0.0, True, False, scale=scale
        )
        return out.transpose(1, 2), lse.reshape(q.shape[0], q.shape[2], q.shape[1]).transpose(1, 2)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, ...]:
        """As `CausalKernel`."""
        length = q.shape[1]
        seed = torch.zeros((), dtype=torch.int64, device=q.device)  # of the dropout, which is 0
        stats = lse.transpose(1, 2).contiguous()[..., None]
        tensors = (x.contiguous() for x in (grad, q, k, v, out))
        gradients = aten._scaled_dot_product_cudnn_attention_backward(
            *swap_tokens_and_heads(*tensors), stats, seed, seed, None, None, None, length, length, 0.0, True, scale=scale
        )
        return swap_tokens_and_heads(*gradients)
