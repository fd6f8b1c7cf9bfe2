"""torch's fused attention for CPUs, as a causal kernel that returns its log-sum-exp."""

import torch.nn.functional as F
from torch import Tensor

from model.attention.kernels.three_calls import aten, swap_tokens_and_heads


class CpuSdpa:
    """torch's flash attention for CPUs. It takes values as wide as keys only: narrower ones are padded with zeros."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """As `CausalKernel`."""
        value_head_dim = v.shape[-1]
        v = F.pad(v, (0, q.shape[-1] - value_head_dim))
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(*swap_tokens_and_heads(q, k, v), 0.0, True, scale=scale)
        return out.transpose(1, 2)[..., :value_head_dim], lse.transpose(1, 2)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, ...]:
        """As `CausalKernel`."""
        value_head_dim = v.shape[-1]
        v, out, grad = (F.pad(x, (0, q.shape[-1] - value_head_dim)) for x in (v, out, grad))
        gradients = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *swap_tokens_and_heads(grad, q, k, v, out, lse), 0.0, True, scale=scale
        )
        d_q, d_k, d_v = swap_tokens_and_heads(*gradients)
        return d_q, d_k, d_v[..., :value_head_dim]
