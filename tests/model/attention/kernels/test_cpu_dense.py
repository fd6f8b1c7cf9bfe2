"""Dense attention of short rows against the definition and against torch's fused kernel."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from model.attention.kernels import cpu_dense, operator
from model.attention.kernels.inputs import AttentionInputs
from model.attention.kernels.reference import reference_attention


def tensors(S, n, k, dtype, H=16, Hv=16):
    generator = torch.Generator().manual_seed(S)
    shapes = [(2, S, n, H), (2, S, k, H), (2, S, k, Hv)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def fused(q, k, v, scale):
    flipped = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*flipped, is_causal=True, scale=scale, enable_gqa=True).transpose(1, 2)


def outcome(attend, inputs, dtype=None):
    inputs = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    out = attend(*inputs, 0.25)
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    return [out.detach(), *torch.autograd.grad(out, inputs, probe.to(out.dtype))]


@settings(max_examples=15, deadline=None)
@given(S=st.sampled_from([1, 2, 127, 128, 129, 300, 512]), group=st.sampled_from([1, 2]), Hv=st.sampled_from([8, 16]))
def test_outputs_and_gradients_are_the_definitions(S, group, Hv):
    inputs = tensors(S, 2 * group, 2, torch.float64, Hv=Hv)
    want = outcome(lambda q, k, v, scale: reference_attention(AttentionInputs(q, k, v), scale)[0], inputs)
    for got, exact in zip(outcome(cpu_dense.dense_attention, inputs), want, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("S", [100, 512])
def test_bf16_errs_little_more_than_the_fused_kernel(S):
    inputs = tensors(S, 4, 2, torch.bfloat16)
    exact = outcome(fused, inputs, torch.float64)
    for ours, theirs, want in zip(outcome(cpu_dense.dense_attention, inputs), outcome(fused, inputs), exact, strict=True):
        assert (ours.double() - want).norm() <= 1.6 * (theirs.double() - want).norm()


def test_it_serves_short_rows_on_a_cpu_and_nothing_else(monkeypatch: pytest.MonkeyPatch):
    lengths = []
    monkeypatch.setattr(cpu_dense, "dense_attention", lambda q, *rest: lengths.append(q.shape[1]) or q)
    for S in (512, 513):
        operator.attend(AttentionInputs(*tensors(S, 2, 2, torch.float32)), 0.25)
    assert lengths == [512]


@pytest.mark.parametrize("S", [1, 100, 300])
def test_the_log_sum_exp_is_the_definitions_beside_the_same_bits(S):
    q, k, v = tensors(S, 4, 2, torch.float64, Hv=8)
    out, lse = cpu_dense.dense_attention_with_lse(q, k, v, 0.25)
    assert torch.equal(out, cpu_dense.dense_attention(q, k, v, 0.25)) and not lse.requires_grad
    torch.testing.assert_close(lse, reference_attention(AttentionInputs(q, k, v), 0.25)[1], rtol=0, atol=1e-13)
    arguments = [x.transpose(1, 2).detach().contiguous().requires_grad_() for x in (q, q, q)]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.tiglon.short_attention_lse, (*arguments, 0.25), test_utils=checks)
