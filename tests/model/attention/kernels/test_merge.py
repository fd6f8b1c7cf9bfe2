"""Attention over two sets of keys, merged, is attention over both."""

import torch

from model.attention.kernels.merge import merge


def test_two_halves_of_a_softmax_are_the_whole():
    generator = torch.Generator().manual_seed(0)
    scores, values = (torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((3, 5, 8), (8, 6)))
    out, lse = scores[..., :2].softmax(-1) @ values[:2], scores[..., :2].logsumexp(-1)
    merge(out, lse, scores[..., 2:].softmax(-1) @ values[2:], scores[..., 2:].logsumexp(-1))
    torch.testing.assert_close(out, scores.softmax(-1) @ values, rtol=0, atol=1e-14)
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=0, atol=1e-14)


def test_keys_without_weight_change_nothing():
    out, lse = torch.ones(2, 3), torch.zeros(2)
    merge(out, lse, torch.full((2, 3), 7.0), torch.full((2,), float("-inf")))
    assert torch.equal(out, torch.ones(2, 3)) and torch.equal(lse, torch.zeros(2))
