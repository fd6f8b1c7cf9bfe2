"""Attention without a mask against a softmax written out."""

import pytest
import torch

from model.attention.kernels.unmasked import attend_unmasked, tiled
from tests.model.attention.kernels.test_operator import peak_growth


def inputs(C, K, H, Hv, dtype=torch.float64, n=4, k=2):
    generator = torch.Generator().manual_seed(C + K)
    shapes = (2, C, n, H), (2, K, k, H), (2, K, k, Hv)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def written_out(q, k, v, scale):
    group = q.shape[2] // k.shape[2]
    q, k, v = q.double(), *(x.double().repeat_interleave(group, dim=2) for x in (k, v))
    scores = torch.einsum("bcnh,bknh->bcnk", q, k) * scale
    return torch.einsum("bcnk,bknh->bcnh", scores.softmax(-1), v), scores.logsumexp(-1)


def by_tiles(q, k, v, scale):
    """Tiles of 7 queries."""
    return tiled(q, k, v, scale, 7 * q.shape[0] * q.shape[2] * k.shape[1])


@pytest.mark.parametrize("attend", [attend_unmasked, by_tiles])
@pytest.mark.parametrize("sizes", [(13, 21, 8, 8), (1, 5, 8, 6), (40, 1, 6, 10), (600, 1300, 8, 8)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_is_the_softmax(attend, sizes, dtype):
    q, k, v = inputs(*sizes, dtype)
    out, lse = attend(q, k, v, 0.3)
    want, want_lse = written_out(q, k, v, 0.3)
    atol = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(out.double(), want, rtol=0, atol=atol)
    torch.testing.assert_close(lse.double(), want_lse, rtol=0, atol=atol)
    assert out.dtype == dtype and lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_memory_is_not_that_of_the_scores():
    """All scores would be 134 MB, those of a tile here 4 MB."""
    q, k, v = inputs(1024, 8192, 16, 16, torch.float32, n=2, k=1)
    for attend in (attend_unmasked, lambda *given: tiled(*given, scores=1 << 20)):
        assert peak_growth(lambda attend=attend: attend(q, k, v, 0.3)) < 40e6
    assert peak_growth(lambda: written_out(q, k, v, 0.3)) > 134e6


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(64, 200, 64, 64), (100, 333, 192, 128), (33, 70, 20, 20)])
def test_on_a_gpu(dtype, sizes):
    q, k, v = (x.cuda() for x in inputs(*sizes, dtype))
    for got, want in zip(attend_unmasked(q, k, v, 0.1), written_out(q, k, v, 0.1), strict=True):
        assert float((got.double() - want).norm() / want.norm()) < (1e-2 if dtype == torch.bfloat16 else 1e-3)
