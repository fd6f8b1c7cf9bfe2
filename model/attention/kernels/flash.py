"""Two regions on a GPU with torch's flash attention: one call with a sliding window, and one on the keys w tokens earlier.

Near is the call with a window, far a causal call on slices; packed documents take the variable-length form, with far
queries and keys gathered. Backward calls take the merged output and log-sum-exp (see model/attention/kernels/three_calls.py).
FlashAttention 3 and 4 serve the same operators after `torch.nn.attention.activate_flash_attention_impl`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention.kernels.inputs import AttentionInputs
from model.attention.kernels.merge import merge
from model.positions.packing import PackedDocuments

aten = torch.ops.aten


@dataclass(frozen=True)
class _Call:
    """One call of the kernel: dense rows [B, S, n, H], or packed tokens [T, n, H] with boundaries."""

    scale: float
    longest: int
    boundaries: Tensor | None = None
    window: int | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp with heads last, [..., n, H] and [..., n]."""
        out, lse, *_ = aten._flash_attention_forward(
            q, k, v, self.boundaries, self.boundaries, self.longest, self.longest, 0.0, True, False,
            scale=self.scale, **self._window_sizes(),
        )  # fmt: skip
        return out, lse.transpose(-1, -2)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k, v."""
        seed = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of the dropout, which is 0
        unused = torch.empty(0, dtype=torch.uint64, device=q.device)
        return aten._flash_attention_backward(
            grad.contiguous(), q, k, v, out.contiguous(), lse.transpose(-1, -2).contiguous(),
            self.boundaries, self.boundaries, self.longest, self.longest, 0.0, True, seed, unused,
            scale=self.scale, **self._window_sizes(),
        )  # fmt: skip

    def _window_sizes(self) -> dict[str, int | None]:
        if self.window is None or self.window >= self.longest:
            return {}
        return {"window_size_left": self.window - 1, "window_size_right": 0}


def _far(inputs: AttentionInputs, scale: float, window: int, documents: PackedDocuments | None) -> tuple[_Call, tuple, tuple]:
    """The far call, and the indices of its queries and of its keys in tensors laid out as `_flatten` does."""
    if documents is None:
        S = inputs.v.shape[1]
        return _Call(scale, S - window), (slice(None), slice(window, None)), (slice(None), slice(0, S - window))
    assert documents.far_queries is not None and documents.far_keys is not None
    call = _Call(scale, inputs.v.shape[1] - window, documents.far_boundaries)
    return call, (documents.far_queries,), (documents.far_keys,)


def _flatten(x: Tensor, documents: PackedDocuments | None) -> Tensor:
    """[B, S, ...], or with documents [T, ...]."""
    return x if documents is None else x.flatten(0, 1)


def forward(
    inputs: AttentionInputs, scale: float, window: int | None, documents: PackedDocuments | None
) -> tuple[Tensor, Tensor]:
    """Output [B, S, n, Hv] and log-sum-exp [B, S, n]; arguments as model.attention.kernels.reference.reference_attention."""
    B, S, _, H = inputs.near_q.shape
    value_head_dim = inputs.v.shape[-1]
    v = _flatten(F.pad(inputs.v, (0, H - value_head_dim)), documents)  # the kernel takes values as wide as keys only
    near = _Call(scale, S, None if documents is None else documents.boundaries, window)
    out, lse = near.forward(_flatten(inputs.near_q, documents), _flatten(inputs.near_k, documents), v)
    if inputs.far_q is not None and inputs.far_k is not None:
        assert window is not None
        call, queries, keys = _far(inputs, scale, window, documents)
        far_q, far_k = _flatten(inputs.far_q, documents)[queries], _flatten(inputs.far_k, documents)[keys]
        if far_q.numel():
            merged_out, merged_lse = out[queries].to(lse.dtype), lse[queries].clone()
            merge(merged_out, merged_lse, *call.forward(far_q, far_k, v[keys]))
            lse = lse.clone()
            out[queries], lse[queries] = merged_out.to(out.dtype), merged_lse
    return out.reshape(B, S, -1, H)[..., :value_head_dim], lse.reshape(B, S, -1)


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
    S, H, value_head_dim = inputs.v.shape[1], inputs.near_q.shape[-1], inputs.v.shape[-1]
    v, out, grad = (_flatten(F.pad(x, (0, H - value_head_dim)), documents) for x in (inputs.v, out, grad))
    lse = _flatten(lse, documents)
    near = _Call(scale, S, None if documents is None else documents.boundaries, window)
    d_q, d_k, d_v = near.backward(grad, _flatten(inputs.near_q, documents), _flatten(inputs.near_k, documents), v, out, lse)
    q_shape, k_shape = inputs.near_q.shape, inputs.near_k.shape
    if inputs.far_q is None or inputs.far_k is None:
        return AttentionInputs(d_q.view(q_shape), d_k.view(k_shape), d_v.view(k_shape)[..., :value_head_dim])
    assert window is not None
    call, queries, keys = _far(inputs, scale, window, documents)
    far_q, far_k = _flatten(inputs.far_q, documents), _flatten(inputs.far_k, documents)
    d_far_q, d_far_k = torch.zeros_like(far_q), torch.zeros_like(far_k)
    if far_q[queries].numel():
        far = call.backward(grad[queries], far_q[queries], far_k[keys], v[keys], out[queries], lse[queries])
        d_far_q[queries], d_far_k[keys] = far[0], far[1]
        d_v[keys] += far[2]
    return AttentionInputs(
        d_q.view(q_shape), d_k.view(k_shape), d_v.view(k_shape)[..., :value_head_dim],
        d_far_q.view(q_shape), d_far_k.view(k_shape),
    )  # fmt: skip
