"""Two regions on a GPU with torch's flash attention: a sliding window, and plain causal attention w tokens earlier.

Near is one call with a window, far one causal call on slices; packed documents go through the variable-length form, far
rows and keys gathered. The backward calls use the merged output and log-sum-exp (see model/squares.py). FlashAttention 3
and 4 serve the same operators after `torch.nn.attention.activate_flash_attention_impl`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.heads import Heads
from model.positions import Documents
from model.squares import merge

aten = torch.ops.aten


@dataclass(frozen=True)
class _Call:
    """One call of the kernel: dense rows [B, S, n, H], or packed tokens [T, n, H] with boundaries."""

    scale: float
    longest: int
    boundaries: Tensor | None = None
    window: int | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp with heads last."""
        out, lse, *_ = aten._flash_attention_forward(
            q, k, v, self.boundaries, self.boundaries, self.longest, self.longest, 0.0, True, False,
            scale=self.scale, **self._sides(),
        )  # fmt: skip
        return out, lse.transpose(-1, -2)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k, v."""
        seed = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of a dropout that is not there
        unused = torch.empty(0, dtype=torch.uint64, device=q.device)
        return aten._flash_attention_backward(
            grad.contiguous(), q, k, v, out.contiguous(), lse.transpose(-1, -2).contiguous(),
            self.boundaries, self.boundaries, self.longest, self.longest, 0.0, True, seed, unused,
            scale=self.scale, **self._sides(),
        )  # fmt: skip

    def _sides(self) -> dict[str, int | None]:
        return {} if self.window is None else {"window_size_left": self.window - 1, "window_size_right": 0}


def _far(heads: Heads, scale: float, window: int, documents: Documents | None) -> tuple[_Call, tuple, tuple]:
    """The far call, and what picks its queries and its keys from tensors laid out as `_lay` does."""
    if documents is None:
        S = heads.v.shape[1]
        return _Call(scale, S - window), (slice(None), slice(window, None)), (slice(None), slice(0, S - window))
    assert documents.far_queries is not None and documents.far_keys is not None
    call = _Call(scale, heads.v.shape[1] - window, documents.far_boundaries)
    return call, (documents.far_queries,), (documents.far_keys,)


def _lay(x: Tensor, documents: Documents | None) -> Tensor:
    """[B, S, ...], or with documents [T, ...]."""
    return x if documents is None else x.flatten(0, 1)


def forward(heads: Heads, scale: float, window: int | None, documents: Documents | None) -> tuple[Tensor, Tensor]:
    """Output [B, S, n, Hv] and log-sum-exp [B, S, n]; arguments as model.heads.reference."""
    B, S, _, H = heads.near_q.shape
    width = heads.v.shape[-1]
    v = _lay(F.pad(heads.v, (0, H - width)), documents)  # the kernel wants values as wide as keys
    near = _Call(scale, S, None if documents is None else documents.boundaries, window)
    out, lse = near.forward(_lay(heads.near_q, documents), _lay(heads.near_k, documents), v)
    if heads.far_q is not None and heads.far_k is not None:
        assert window is not None
        call, queries, keys = _far(heads, scale, window, documents)
        far_q, far_k = _lay(heads.far_q, documents)[queries], _lay(heads.far_k, documents)[keys]
        if far_q.numel():
            more, more_lse = call.forward(far_q, far_k, v[keys])
            part, part_lse = out[queries].to(lse.dtype), lse[queries].clone()
            merge(part, part_lse, more, more_lse)
            lse = lse.clone()
            out[queries], lse[queries] = part.to(out.dtype), part_lse
    return out.reshape(B, S, -1, H)[..., :width], lse.reshape(B, S, -1)


def backward(
    grad: Tensor, heads: Heads, out: Tensor, lse: Tensor, scale: float, window: int | None, documents: Documents | None
) -> Heads:
    """Gradients from grad and out [B, S, n, Hv] and lse [B, S, n]."""
    S, H, width = heads.v.shape[1], heads.near_q.shape[-1], heads.v.shape[-1]
    v, out, grad = (_lay(F.pad(x, (0, H - width)), documents) for x in (heads.v, out, grad))
    lse = _lay(lse, documents)
    near = _Call(scale, S, None if documents is None else documents.boundaries, window)
    d_q, d_k, d_v = near.backward(grad, _lay(heads.near_q, documents), _lay(heads.near_k, documents), v, out, lse)
    shaped = heads.near_q.shape, heads.near_k.shape
    if heads.far_q is None or heads.far_k is None:
        return Heads(d_q.view(shaped[0]), d_k.view(shaped[1]), d_v.view(*shaped[1])[..., :width])
    assert window is not None
    call, queries, keys = _far(heads, scale, window, documents)
    far_q, far_k = _lay(heads.far_q, documents), _lay(heads.far_k, documents)
    d_far_q, d_far_k = torch.zeros_like(far_q), torch.zeros_like(far_k)
    if far_q[queries].numel():
        far = call.backward(grad[queries], far_q[queries], far_k[keys], v[keys], out[queries], lse[queries])
        d_far_q[queries], d_far_k[keys] = far[0], far[1]
        d_v[keys] += far[2]
    return Heads(
        d_q.view(shaped[0]), d_k.view(shaped[1]), d_v.view(*shaped[1])[..., :width],
        d_far_q.view(shaped[0]), d_far_k.view(shaped[1]),
    )  # fmt: skip
