"""Two regions on a GPU with torch's flash attention: one call with a sliding window, and one on the keys w tokens earlier.

Near is the call with a window, far a causal call on slices; packed documents take the variable-length form, with far
queries and keys gathered. The kernel takes the last query and the last key for the same token where there are fewer queries
than keys, with and without a window. Backward calls take the merged output and log-sum-exp (see
model/attention/kernels/three_calls.py).
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
class _Boundaries:
    """Of packed documents: int32 [documents + 1] over the queries, and over the keys."""

    queries: Tensor
    keys: Tensor


@dataclass(frozen=True)
class _Call:
    """One call of the kernel, in which the last query and the last key of a row, or of a document, are one token: dense rows
    [B, S, n, H], or packed tokens [T, n, H] with boundaries."""

    scale: float
    queries: int
    """Of a row: no document has more. The same of the keys."""
    keys: int
    boundaries: _Boundaries | None = None
    window: int | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp with heads last, [..., n, H] and [..., n]."""
        out, lse, *_ = aten._flash_attention_forward(
            q, k, v, *self._lengths(), 0.0, True, False, scale=self.scale, **self._window_sizes()
        )
        return out, lse.transpose(-1, -2)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k, v."""
        seed = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of the dropout, which is 0
        unused = torch.empty(0, dtype=torch.uint64, device=q.device)
        return aten._flash_attention_backward(
            grad.contiguous(), q, k, v, out.contiguous(), lse.transpose(-1, -2).contiguous(),
            *self._lengths(), 0.0, True, seed, unused, scale=self.scale, **self._window_sizes(),
        )  # fmt: skip

    def _lengths(self) -> tuple[Tensor | None, Tensor | None, int, int]:
        """Boundaries of queries and of keys, and the longest of both."""
        if self.boundaries is None:
            return None, None, self.queries, self.keys
        # told that no document has more than one query, the kernel takes it that every one has one
        return self.boundaries.queries, self.boundaries.keys, max(2, self.queries), self.keys

    def _window_sizes(self) -> dict[str, int | None]:
        if self.window is None or self.window >= self.keys:
            return {}
        return {"window_size_left": self.window - 1, "window_size_right": 0}


def _near(inputs: AttentionInputs, scale: float, window: int | None, documents: PackedDocuments | None) -> _Call:
    boundaries = None if documents is None else _Boundaries(documents.query_boundaries, documents.boundaries)
    return _Call(scale, inputs.queries, inputs.tokens, boundaries, window)


def _far(inputs: AttentionInputs, scale: float, window: int, documents: PackedDocuments | None) -> tuple[_Call, tuple, tuple]:
    """The far call, and the indices of its queries and of its keys in tensors laid out as `_flatten` does. Of a row, the
    queries are tokens from `window` on, and the keys all but the last `window` tokens."""
    keys = inputs.tokens - window
    queries = min(inputs.queries, keys)
    if documents is None:
        return _Call(scale, queries, keys), (slice(None), slice(inputs.queries - queries, None)), (slice(None), slice(0, keys))
    assert documents.far_queries is not None and documents.far_keys is not None
    assert documents.far_boundaries is not None and documents.far_key_boundaries is not None
    boundaries = _Boundaries(documents.far_boundaries, documents.far_key_boundaries)
    return _Call(scale, queries, keys, boundaries), (documents.far_queries,), (documents.far_keys,)


def _flatten(x: Tensor, documents: PackedDocuments | None) -> Tensor:
    """[B, S, ...], or with documents [T, ...]; of queries C for S."""
    return x if documents is None else x.flatten(0, 1)


def forward(
    inputs: AttentionInputs, scale: float, window: int | None, documents: PackedDocuments | None
) -> tuple[Tensor, Tensor]:
    """Output [B, C, n, Hv] and log-sum-exp [B, C, n]; arguments as model.attention.kernels.reference.reference_attention."""
    B, C, _, H = inputs.near_q.shape
    value_head_dim = inputs.v.shape[-1]
    v = _flatten(F.pad(inputs.v, (0, H - value_head_dim)), documents)  # the kernel takes values as wide as keys only
    near = _near(inputs, scale, window, documents)
    out, lse = near.forward(_flatten(inputs.near_q, documents), _flatten(inputs.near_k, documents), v)
    if inputs.far_q is not None and inputs.far_k is not None and window is not None and window < inputs.tokens:
        call, queries, keys = _far(inputs, scale, window, documents)
        far_q, far_k = _flatten(inputs.far_q, documents)[queries], _flatten(inputs.far_k, documents)[keys]
        if far_q.numel():
            merged_out, merged_lse = out[queries].to(lse.dtype), lse[queries].clone()
            merge(merged_out, merged_lse, *call.forward(far_q, far_k, v[keys]))
            lse = lse.clone()
            out[queries], lse[queries] = merged_out.to(out.dtype), merged_lse
    return out.reshape(B, C, -1, H)[..., :value_head_dim], lse.reshape(B, C, -1)


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
    H, value_head_dim = inputs.near_q.shape[-1], inputs.v.shape[-1]
    v, out, grad = (_flatten(F.pad(x, (0, H - value_head_dim)), documents) for x in (inputs.v, out, grad))
    lse = _flatten(lse, documents)
    near = _near(inputs, scale, window, documents)
    d_q, d_k, d_v = near.backward(grad, _flatten(inputs.near_q, documents), _flatten(inputs.near_k, documents), v, out, lse)
    q_shape, k_shape = inputs.near_q.shape, inputs.near_k.shape
    if inputs.far_q is None or inputs.far_k is None or window is None or window >= inputs.tokens:
        return AttentionInputs(d_q.view(q_shape), d_k.view(k_shape), d_v.view(k_shape)[..., :value_head_dim])
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
