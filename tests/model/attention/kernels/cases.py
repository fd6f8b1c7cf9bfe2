"""Random inputs of attention, what a backend differs from the definition by, and GPU operators by definition."""

import torch
import torch.nn.functional as F

from model.attention.kernels.inputs import AttentionInputs
from model.attention.kernels.reference import reference_attention
from model.positions.packing import document_of_tokens, pack_documents


def random_inputs(S, far=True, B=2, n=4, k=2, H=8, Hv=6, dtype=torch.float64, seed=0, queries=None):
    """Leaves that require gradients; the last `queries` tokens, or all, are queries."""
    generator = torch.Generator().manual_seed(seed)
    C = queries or S
    shapes = [(C, n, H), (S, k, H), (S, k, Hv), *([(C, n, H), (S, k, H)] if far else [])]
    return AttentionInputs(*(torch.randn(B, *shape, dtype=dtype, generator=generator).requires_grad_() for shape in shapes))


def packed(*boundaries, **lengths):
    return pack_documents(torch.tensor(boundaries), None, lists=False, **lengths)


TWO_ROWS = (0, 100, 650, 700, 720, 1300, 1400)
"""Documents of two rows of 700 tokens. Of 100 queries at the end of each row the first document has none, the second some,
and the third and the last all."""

CHUNKS = {  # far, window, boundaries; of rows of 700 tokens
    "causal": (False, None, None),
    "sliding window": (False, 90, None),
    "two regions": (True, 90, None),
    "two regions within the chunk": (True, 20, None),
    "window longer than the row": (True, 800, None),
    "documents": (False, None, TWO_ROWS),
    "documents, sliding window": (False, 90, TWO_ROWS),
    "documents, two regions": (True, 90, TWO_ROWS),
}
"""Masks of the last tokens of longer rows."""


def chunk(S, queries, far, window, boundaries, **sizes):
    """Inputs of the last tokens of rows and their documents, with lists."""
    documents = None
    if boundaries is not None:
        documents = pack_documents(torch.tensor(boundaries), window if far else None, lists=True, keys=S, queries=queries)
    return random_inputs(S, far, queries=queries, **sizes), documents


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
    assert len(got.tensors()) == len(wanted) or (window is not None and window >= inputs.tokens)  # nothing is far
    for a, b in zip(got.tensors(), wanted, strict=False):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def widened(x, like):
    return F.pad(x, (0, like.shape[-1] - x.shape[-1]))


class DenseFlash:
    """The operators of torch's GPU flash attention, by definition, so that what surrounds them runs on a CPU."""

    @staticmethod
    def _visible(q_length, k_length, q_cuts, k_cuts, left):
        """The last query and the last key of a row, or of a document, are one token."""
        if q_cuts is None:
            q_cuts, k_cuts = torch.tensor([0, q_length]), torch.tensor([0, k_length])
        q_document, k_document = document_of_tokens(q_cuts, q_length), document_of_tokens(k_cuts, k_length)
        i = torch.arange(q_length) + (k_cuts[1:] - q_cuts[1:])[q_document]  # the key of the same token
        distance = i[:, None] - torch.arange(k_length)
        visible = (distance >= 0) & (q_document[:, None] == k_document)
        return visible if left is None else visible & (distance <= left)

    @classmethod
    def _scores(cls, q, k, lengths, scale, left):
        q_cuts, k_cuts, longest_q, longest_k = lengths
        if q_cuts is not None:
            assert (q_cuts[-1], k_cuts[-1]) == (len(q), len(k)) and q_cuts.dtype == k_cuts.dtype == torch.int32
            assert q_cuts.diff().max() <= longest_q and k_cuts.diff().max() <= longest_k
            assert longest_q > 1 or (q_cuts.diff() == 1).all()  # what the kernel makes of 1
        k = k.repeat_interleave(q.shape[-2] // k.shape[-2], -2)
        visible = cls._visible(q.shape[-3], k.shape[-3], q_cuts, k_cuts, left)
        return (torch.einsum("...inh,...jnh->...nij", q, k) * scale).masked_fill(~visible, float("-inf"))

    @classmethod
    def _flash_attention_forward(cls, q, k, v, q_cuts, k_cuts, longest_q, longest_k, _p, causal, _debug, *, scale, **sides):
        assert causal and q.shape[-1] == v.shape[-1] and sides.get("window_size_right") in (None, 0)
        scores = cls._scores(q, k, (q_cuts, k_cuts, longest_q, longest_k), scale, sides.get("window_size_left"))
        v = v.repeat_interleave(q.shape[-2] // v.shape[-2], -2)
        return torch.einsum("...nij,...jnh->...inh", scores.softmax(-1), v), scores.logsumexp(-1), None, None, None

    @classmethod
    def _flash_attention_backward(
        cls, grad, q, k, v, out, lse, q_cuts, k_cuts, longest_q, longest_k, _p, causal, _s, _u, *, scale, **sides
    ):
        group = q.shape[-2] // k.shape[-2]
        scores = cls._scores(q, k, (q_cuts, k_cuts, longest_q, longest_k), scale, sides.get("window_size_left"))
        p = (scores - lse[..., None]).exp()
        wide_k, wide_v = (x.repeat_interleave(group, -2) for x in (k, v))
        dot = (grad * out).sum(-1).transpose(-1, -2)[..., None]
        d_scores = p * (torch.einsum("...inh,...jnh->...nij", grad, wide_v) - dot) * scale
        d_q = torch.einsum("...nij,...jnh->...inh", d_scores, wide_k)
        d_k = torch.einsum("...nij,...inh->...jnh", d_scores, q)
        d_v = torch.einsum("...nij,...inh->...jnh", p, grad)
        return d_q, *(x.unflatten(-2, (-1, group)).sum(-2) for x in (d_k, d_v))
