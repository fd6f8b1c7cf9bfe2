"""The compiled attention of a CPU against the definition: every window, region, packing and size of heads."""

import shutil

import pytest
import torch
import torch.nn.functional as F

from model.attention.kernels import cpu_flash, operator
from model.attention.kernels.inputs import AttentionInputs
from model.attention.kernels.reference import reference_attention
from tests.model.attention.kernels.cases import CHUNKS, TWO_ROWS, chunk, packed, random_inputs

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")

PORTABLE = (*cpu_flash.FLAGS, "-U__AVX512BF16__")
"""What a processor without products of bfloat16 runs."""

CASES = {  # B, S, n, k, H, Hv, far, window, boundaries; and how many tokens are queries, if not all
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
    "last token": (2, 130, 4, 2, 32, 48, False, None, None, 1),
    "last tokens, groups": (2, 700, 4, 2, 32, 16, False, None, None, 100),
    "last tokens, sliding window": (2, 700, 2, 1, 16, 32, False, 90, None, 64),
    "last tokens, two regions": (2, 700, 4, 2, 32, 16, True, 90, None, 100),
    "last tokens, window of a few": (1, 700, 2, 2, 16, 16, True, 3, None, 5),
    "last tokens, window longer than the row": (1, 200, 2, 2, 16, 16, True, 250, None, 70),
    "last tokens, documents": (2, 700, 4, 2, 32, 16, False, None, TWO_ROWS, 100),
    "last tokens, documents, sliding window": (2, 700, 2, 2, 16, 16, False, 90, TWO_ROWS, 5),
    "last tokens, documents, two regions": (2, 700, 4, 2, 32, 16, True, 90, TWO_ROWS, 100),
}


def bf16_inputs(B, S, n, k, H, Hv, far, queries=None):
    inputs = random_inputs(S, far, B, n, k, H, Hv, torch.float32, seed=S, queries=queries)
    return inputs.map(lambda x: x.detach().bfloat16())


def outcome(attend, inputs, dtype):
    """Output and gradients for a fixed probe."""
    inputs = inputs.map(lambda x: x.detach().to(dtype).requires_grad_())
    out = attend(inputs)
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(out.dtype)
    gradients = torch.autograd.grad(out, inputs.tensors(), probe, allow_unused=True)
    return [out.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip(inputs.tensors(), gradients))]


def errors(got, want):
    """Relative to the whole tensor; absolute where it should be zero."""
    return [float((a.double() - b).norm() / (b.norm() or 1.0)) for a, b in zip(got, want, strict=True)]


@pytest.mark.parametrize("flags", [cpu_flash.FLAGS, PORTABLE], ids=["native", "portable"])
@pytest.mark.parametrize("case", CASES)
def test_it_is_attention(case, flags, monkeypatch):
    sizes, (window, boundaries, *queries) = CASES[case][:7], CASES[case][7:]
    lengths = {"keys": sizes[1], "queries": queries[0]} if queries else {}
    monkeypatch.setattr(cpu_flash, "library", lambda kernel=cpu_flash.library: kernel(flags))
    inputs, documents = bf16_inputs(*sizes, *queries), None if boundaries is None else packed(*boundaries, **lengths)
    scale = sizes[4] ** -0.5
    want = outcome(lambda x: reference_attention(x, scale, window, documents)[0], inputs, torch.float64)
    got = outcome(lambda x: operator.attend(x, scale, window, documents, compiled=True), inputs, torch.bfloat16)
    assert max(errors(got, want)) < 4e-3  # half a unit in the last place of bfloat16 is 2e-3 of a number at most
    _, lse = cpu_flash.forward(inputs, scale, window, documents)
    _, exact = reference_attention(inputs.map(torch.Tensor.double), scale, window, documents)
    torch.testing.assert_close(lse.double(), exact, rtol=0, atol=1e-5)  # scores rounded to bfloat16 would miss by 1e-2


def test_it_errs_no_more_than_the_fused_kernel():
    inputs = bf16_inputs(2, 400, 4, 2, 64, 64, False)

    def fused(x):
        flipped = (y.transpose(1, 2) for y in (x.near_q, x.near_k, x.v))
        return F.scaled_dot_product_attention(*flipped, is_causal=True, scale=0.125, enable_gqa=True).transpose(1, 2)

    want = outcome(fused, inputs, torch.float64)
    ours = errors(outcome(lambda x: operator.attend(x, 0.125, compiled=True), inputs, torch.bfloat16), want)
    theirs = errors(outcome(fused, inputs, torch.bfloat16), want)
    assert all(a <= 1.1 * b for a, b in zip(ours, theirs)), (ours, theirs)


def test_large_and_equal_scores():
    """Scores of +-2,000 must neither overflow nor lose the row; equal ones give the mean of the values."""
    inputs = bf16_inputs(1, 200, 2, 2, 16, 16, False)
    large = AttentionInputs(inputs.near_q * 100, inputs.near_k * 20, inputs.v)
    want = outcome(lambda x: reference_attention(x, 0.25)[0], large, torch.float64)
    got = outcome(lambda x: operator.attend(x, 0.25, compiled=True), large, torch.bfloat16)
    assert all(x.isfinite().all() for x in got)
    assert max(errors(got, want)) < 2e-2  # of q and k they are differences of nearly equal numbers
    equal = AttentionInputs(torch.zeros_like(inputs.near_q), inputs.near_k, inputs.v)
    mean = inputs.v.double().cumsum(1) / torch.arange(1, 201)[:, None, None]
    assert errors([cpu_flash.forward(equal, 0.25, None, None)[0]], [mean])[0] < 4e-3


@pytest.mark.parametrize("flags", [cpu_flash.FLAGS, PORTABLE], ids=["native", "portable"])
def test_what_is_not_a_number_is_not_hidden(flags, monkeypatch):
    """Training must see it, and skip the step."""
    monkeypatch.setattr(cpu_flash, "library", lambda kernel=cpu_flash.library: kernel(flags))
    inputs = bf16_inputs(1, 150, 1, 1, 16, 16, False)
    inputs.near_k[0, 70, 0, 3] = torch.nan
    out, _ = cpu_flash.forward(inputs, 0.25, None, None)
    assert out[0, :70].isfinite().all() and out[0, 70:].isnan().all()
    inputs = bf16_inputs(1, 150, 1, 1, 16, 16, False)
    out, lse = cpu_flash.forward(inputs, 0.25, None, None)
    probe = torch.ones_like(out)
    probe[0, 80] = torch.nan
    gradients = cpu_flash.backward(probe, inputs, out, lse, 0.25, None, None)
    assert (
        gradients.near_q[0, 80].isnan().all() and gradients.near_k[0, :81].isnan().all() and gradients.v[0, :81].isnan().all()
    )


def test_the_same_bits_on_any_number_of_threads():
    inputs = bf16_inputs(2, 300, 4, 2, 32, 32, True)
    before, outcomes = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outcomes.append(outcome(lambda x: operator.attend(x, 0.2, 70, compiled=True), inputs, torch.bfloat16))
    finally:
        torch.set_num_threads(before)
    for other in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outcomes[0], other))


def test_a_gradient_that_has_to_be_copied_lives_until_it_is_read(monkeypatch):
    """That of a sum is one number at all places. What is allocated just before the kernel runs would be where it was."""
    inputs, later, library = bf16_inputs(1, 150, 2, 2, 16, 16, False), [], cpu_flash.library
    out, lse = cpu_flash.forward(inputs, 0.25, None, None)
    want = cpu_flash.backward(torch.ones_like(out), inputs, out, lse, 0.25, None, None)

    def late():
        later.extend(torch.full_like(out, torch.nan) for _ in range(100))
        return library()

    class Late:
        def attention_backward(self, *arguments):
            late().attention_backward(*arguments)

    monkeypatch.setattr(cpu_flash, "library", Late)
    got = cpu_flash.backward(torch.ones((), dtype=torch.bfloat16).expand_as(out), inputs, out, lse, 0.25, None, None)
    assert all(torch.equal(one, other) for one, other in zip(got.tensors(), want.tensors(), strict=True))


def test_it_is_used_where_it_serves_and_nowhere_else(monkeypatch):
    dtypes, forward = [], cpu_flash.forward
    monkeypatch.setattr(cpu_flash, "forward", lambda *arguments: dtypes.append(arguments[0].v.dtype) or forward(*arguments))
    inputs = bf16_inputs(1, 40, 2, 2, 16, 16, False)
    operator.attend(inputs, 0.25)
    operator.attend(inputs.map(torch.Tensor.float), 0.25, compiled=True)
    operator.attend(bf16_inputs(1, 40, 2, 2, 24, 24, False), 0.25, compiled=True)
    assert dtypes == []
    operator.attend(inputs, 0.25, compiled=True)
    assert dtypes == [torch.bfloat16]


@pytest.mark.parametrize("case", CHUNKS)
def test_a_key_that_no_query_sees_has_no_gradient_at_all(case):
    """Exactly zero, and no more keys than those: of the last 5 of 700 tokens."""
    far, window, boundaries = CHUNKS[case]
    inputs, documents = chunk(700, 5, far, window, boundaries, H=16, Hv=16)
    got = outcome(lambda x: operator.attend(x, 0.25, window, documents, compiled=True), inputs, torch.bfloat16)
    want = outcome(lambda x: reference_attention(x, 0.25, window, documents)[0], inputs, torch.float64)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one.abs().amax(dim=(2, 3)) > 0, other.abs().amax(dim=(2, 3)) > 0)


def test_operator_is_registered_soundly():
    inputs = bf16_inputs(1, 70, 2, 2, 16, 16, True).map(torch.Tensor.requires_grad_).tensors()
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.tiglon.causal_attention, (inputs, [], 20, 0.3, True), test_utils=checks)
