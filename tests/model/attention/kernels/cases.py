"""Random inputs of attention, what a backend differs from the definition by, and GPU operators by definition."""

import torch
import torch.nn.functional as F

from model.attention.kernels.inputs import AttentionInputs
from model.attention.kernels.reference import reference_attention
from model.positions.packing import PackedDocuments


def random_inputs(S, far=True, B=2, n=4, k=2, H=8, Hv=6, dtype=torch.float64, seed=0):
    """Leaves that require gradients."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(n, H), (k, H), (k, Hv), *([(n, H), (k, H)] if far else [])]
    return AttentionInputs(*(torch.randn(B, S, *shape, dtype=dtype, generator=generator).requires_grad_() for shape in shapes))


def packed(*boundaries):
    return PackedDocuments(torch.tensor(boundaries, dtype=torch.int32))


def error(attend, inputs, window, documents=None):
    """Largest difference to the definition, of outputs and of all gradients."""
    want, _ = reference_attention(inputs, 0.3, window, documents)
    got = attend(inputs, 0.3, window, documents)
    probe = torch.randn(want.shape, dtype=want.dtype, generator=torch.Generator().manual_seed(1))
    gradients = (torch.autograd.grad(out, inputs.tensors(), probe) for out in (got, want))
    return max(float((a - b).detach().abs().max()) for a, b in [(got, want), *zip(*gradients, strict=True)])


def check_backend(forward, backward, inputs, window, documents=None):
    """A backend's own forward and backward against the definition: output, log-sum-exp and gradients."""
    with torch.no_grad():
        out, lse = forward(inputs, 0.3, window)
        want, want_lse = reference_attention(inputs, 0.3, window, documents)
        torch.testing.assert_close(out, want, rtol=0, atol=1e-12)
        torch.testing.assert_close(lse, want_lse, rtol=0, atol=1e-12)
        probe = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
        got = backward(probe, inputs, out, lse, 0.3, window)
    wanted = torch.autograd.grad(reference_attention(inputs, 0.3, window, documents)[0], inputs.tensors(), probe)
    for a, b in zip(got.tensors(), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def widened(x, like):
    return F.pad(x, (0, like.shape[-1] - x.shape[-1]))


class DenseFlash:
    """The operators of torch's GPU flash attention, by definition, so that what surrounds them runs on a CPU."""

    @staticmethod
    def _visible(length, boundaries, left):
        i = torch.arange(length)
        visible = i[:, None] >= i
        if left is not None:
            visible &= i[:, None] - i <= left
        if boundaries is not None:
            document = torch.searchsorted(boundaries.long(), i, right=True)
            visible &= document[:, None] == document
        return visible

    @classmethod
    def _scores(cls, q, k, boundaries, scale, left):
        k = k.repeat_interleave(q.shape[-2] // k.shape[-2], -2)
        visible = cls._visible(q.shape[-3], boundaries, left)
        return (torch.einsum("...inh,...jnh->...nij", q, k) * scale).masked_fill(~visible, float("-inf"))

    @classmethod
    def _flash_attention_forward(cls, q, k, v, boundaries, _b, _q, _k, _p, causal, _debug, *, scale, **sides):
        assert causal and q.shape[-1] == v.shape[-1] and sides.get("window_size_right") in (None, 0)
        scores = cls._scores(q, k, boundaries, scale, sides.get("window_size_left"))
        v = v.repeat_interleave(q.shape[-2] // v.shape[-2], -2)
        return torch.einsum("...nij,...jnh->...inh", scores.softmax(-1), v), scores.logsumexp(-1), None, None, None

    @classmethod
    def _flash_attention_backward(cls, grad, q, k, v, out, lse, boundaries, _b, _q, _k, _p, causal, _s, _u, *, scale, **sides):
        group = q.shape[-2] // k.shape[-2]
        p = (cls._scores(q, k, boundaries, scale, sides.get("window_size_left")) - lse[..., None]).exp()
        wide_k, wide_v = (x.repeat_interleave(group, -2) for x in (k, v))
        dot = (grad * out).sum(-1).transpose(-1, -2)[..., None]
        d_scores = p * (torch.einsum("...inh,...jnh->...nij", grad, wide_v) - dot) * scale
        d_q = torch.einsum("...nij,...jnh->...inh", d_scores, wide_k)
        d_k = torch.einsum("...nij,...inh->...jnh", d_scores, q)
        d_v = torch.einsum("...nij,...inh->...jnh", p, grad)
        return d_q, *(x.unflatten(-2, (-1, group)).sum(-2) for x in (d_k, d_v))
