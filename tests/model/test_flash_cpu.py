"""The compiled attention of a CPU against the definition: every window, region, packing and size of heads."""

import shutil

import pytest
import torch
import torch.nn.functional as F

from model import flash_cpu, kernels
from model.heads import Heads, reference
from model.positions import Documents

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")

PORTABLE = (*flash_cpu.FLAGS, "-U__AVX512BF16__")
"""What a processor without products of bfloat16 runs."""

CASES = {  # B, S, n, k, H, Hv, far, window, bounds
    "one token": (1, 1, 1, 1, 16, 16, False, None, None),
    "odd rows": (2, 129, 4, 4, 64, 64, False, None, None),
    "groups": (2, 300, 4, 2, 32, 48, False, None, None),
    "sliding window": (2, 300, 4, 2, 64, 64, False, 50, None),
    "sees itself only": (1, 140, 2, 2, 16, 16, False, 1, None),
    "two regions": (2, 300, 4, 1, 64, 16, True, 70, None),
    "window of a block": (1, 513, 2, 2, 32, 32, True, 128, None),
    "window of one": (2, 130, 2, 2, 16, 16, True, 1, None),
    "window as long as the row": (2, 130, 2, 2, 16, 16, True, 130, None),
    "latent heads": (1, 257, 4, 4, 192, 128, True, 64, None),
    "documents": (2, 300, 4, 2, 64, 64, False, None, (0, 1, 3, 128, 300, 600)),
    "documents, two regions": (2, 300, 4, 2, 32, 32, True, 64, (0, 5, 100, 300, 301, 450, 600)),
}


def heads(B, S, n, k, H, Hv, far):
    generator = torch.Generator().manual_seed(S)
    shapes = [(n, H), (k, H), (k, Hv), *([(n, H), (k, H)] if far else [])]
    return Heads(*(torch.randn(B, S, *shape, generator=generator).bfloat16() for shape in shapes))


def tensors(h):
    return [x for x in h.tensors() if x is not None]


def outcome(attend, h, dtype):
    """Output and gradients for a fixed probe."""
    inputs = [x.detach().to(dtype).requires_grad_() for x in tensors(h)]
    out = attend(Heads(*inputs))
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(out.dtype)
    found = torch.autograd.grad(out, inputs, probe, allow_unused=True)
    return [out.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found))]


def errors(got, want):
    """Relative to the whole tensor; absolute where it should be zero."""
    return [float((a.double() - b).norm() / (b.norm() or 1.0)) for a, b in zip(got, want, strict=True)]


@pytest.mark.parametrize("flags", [flash_cpu.FLAGS, PORTABLE], ids=["native", "portable"])
@pytest.mark.parametrize("case", CASES)
def test_it_is_attention(case, flags, monkeypatch):
    *sizes, window, bounds = CASES[case]
    monkeypatch.setattr(flash_cpu, "library", lambda kernel=flash_cpu.library: kernel(flags))
    h, documents = heads(*sizes), None if bounds is None else Documents(torch.tensor(bounds, dtype=torch.int32))
    scale = sizes[4] ** -0.5
    want = outcome(lambda x: reference(x, scale, window, documents)[0], h, torch.float64)
    got = outcome(lambda x: kernels.attend(x, scale, window, documents, compiled=True), h, torch.bfloat16)
    assert max(errors(got, want)) < 4e-3  # half a unit in the last place of bfloat16 is 2e-3 of a number at most
    _, lse = flash_cpu.forward(h, scale, window, documents)
    _, exact = reference(Heads(*(x.double() for x in tensors(h))), scale, window, documents)
    torch.testing.assert_close(lse.double(), exact, rtol=0, atol=1e-5)  # scores rounded to bfloat16 would miss by 1e-2


def test_it_errs_no_more_than_the_fused_kernel():
    h = heads(2, 400, 4, 2, 64, 64, False)

    def fused(x):
        flipped = (y.transpose(1, 2) for y in (x.near_q, x.near_k, x.v))
        return F.scaled_dot_product_attention(*flipped, is_causal=True, scale=0.125, enable_gqa=True).transpose(1, 2)

    want = outcome(fused, h, torch.float64)
    ours = errors(outcome(lambda x: kernels.attend(x, 0.125, compiled=True), h, torch.bfloat16), want)
    theirs = errors(outcome(fused, h, torch.bfloat16), want)
    assert all(a <= 1.1 * b for a, b in zip(ours, theirs)), (ours, theirs)


def test_large_and_equal_scores():
    """Scores of +-2,000 must neither overflow nor lose the row; equal ones give the mean of the values."""
    h = heads(1, 200, 2, 2, 16, 16, False)
    loud = Heads(h.near_q * 100, h.near_k * 20, h.v)
    want = outcome(lambda x: reference(x, 0.25)[0], loud, torch.float64)
    got = outcome(lambda x: kernels.attend(x, 0.25, compiled=True), loud, torch.bfloat16)
    assert all(x.isfinite().all() for x in got)
    assert max(errors(got, want)) < 2e-2  # of q and k they are differences of nearly equal numbers
    flat = Heads(torch.zeros_like(h.near_q), h.near_k, h.v)
    mean = h.v.double().cumsum(1) / torch.arange(1, 201)[:, None, None]
    assert errors([flash_cpu.forward(flat, 0.25, None, None)[0]], [mean])[0] < 4e-3


@pytest.mark.parametrize("flags", [flash_cpu.FLAGS, PORTABLE], ids=["native", "portable"])
def test_what_is_not_a_number_is_not_hidden(flags, monkeypatch):
    """The run must see it, and leave the step out."""
    monkeypatch.setattr(flash_cpu, "library", lambda kernel=flash_cpu.library: kernel(flags))
    h = heads(1, 150, 1, 1, 16, 16, False)
    h.near_k[0, 70, 0, 3] = torch.nan
    out, _ = flash_cpu.forward(h, 0.25, None, None)
    assert out[0, :70].isfinite().all() and out[0, 70:].isnan().all()
    h = heads(1, 150, 1, 1, 16, 16, False)
    out, lse = flash_cpu.forward(h, 0.25, None, None)
    probe = torch.ones_like(out)
    probe[0, 80] = torch.nan
    found = flash_cpu.backward(probe, h, out, lse, 0.25, None, None)
    assert found.near_q[0, 80].isnan().all() and found.near_k[0, :81].isnan().all() and found.v[0, :81].isnan().all()


def test_the_same_bits_on_any_number_of_threads():
    h = heads(2, 300, 4, 2, 32, 32, True)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(outcome(lambda x: kernels.attend(x, 0.2, 70, compiled=True), h, torch.bfloat16))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


def test_it_is_used_where_it_serves_and_nowhere_else(monkeypatch):
    seen = []
    forward = flash_cpu.forward
    monkeypatch.setattr(flash_cpu, "forward", lambda *given: seen.append(given[0].v.dtype) or forward(*given))
    h = heads(1, 40, 2, 2, 16, 16, False)
    kernels.attend(h, 0.25)
    kernels.attend(Heads(*(x.float() for x in tensors(h))), 0.25, compiled=True)
    kernels.attend(heads(1, 40, 2, 2, 24, 24, False), 0.25, compiled=True)
    assert seen == []
    kernels.attend(h, 0.25, compiled=True)
    assert seen == [torch.bfloat16]


def test_operator_is_registered_soundly():
    inputs = [x.requires_grad_() for x in tensors(heads(1, 70, 2, 2, 16, 16, True))]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.tiglon.attend, (*inputs, None, None, None, None, 20, 0.3, True), test_utils=checks)
