"""Two regions by three calls of a causal kernel, here torch's for CPUs."""

import pytest
import torch

from model.attention.kernels import operator, three_calls
from model.attention.kernels.cpu_sdpa import CpuSdpa
from model.attention.kernels.dispatch import AttentionProblem
from model.attention.kernels.reference import reference_attention
from tests.model.attention.kernels.cases import check_backend, random_inputs


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("far", [True, False])
def test_three_calls_are_the_definition(far, compiled):
    """Merged in eager mode, or by Inductor as on a GPU."""
    check_backend(
        lambda *arguments: three_calls.forward(CpuSdpa(), *arguments, compiled=compiled),
        lambda *arguments: three_calls.backward(CpuSdpa(), *arguments),
        random_inputs(50, far), 13,
    )  # fmt: skip


@pytest.mark.parametrize("window", [1, 2, 16, 62, 63, 64, 99])
def test_the_shortest_call_is_known_before_the_backend_is_chosen(window):
    """A window of w tokens makes calls of w - 1, and one of what is left of the row; a call of no token is left out."""
    lengths = []

    class Recording(CpuSdpa):
        def forward(self, q, k, v, scale):
            lengths.append(q.shape[1])
            return super().forward(q, k, v, scale)

    inputs = random_inputs(64)
    with torch.no_grad():
        three_calls.forward(Recording(), inputs, 0.3, window)
    assert min(lengths) == max(1, AttentionProblem.of(inputs, window, None, False).shortest_call)


def test_merging_by_autograd_would_be_wrong():
    """The fault that this design avoids: torch's kernel drops the gradient of its log-sum-exp without an error."""
    inputs, window = random_inputs(64, Hv=8, n=2, k=2), 16

    def merged(inputs):
        queries, keys = slice(window, None), slice(0, 64 - window)
        distance = torch.arange(64)[:, None] - torch.arange(64)
        mask = torch.zeros(64, 64, dtype=torch.float64).masked_fill((distance < 0) | (distance >= window), float("-inf"))
        attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        near, lse = attention(*(x.transpose(1, 2) for x in inputs.near().tensors()), attn_mask=mask, scale=0.3)
        far_inputs = (inputs.far_q[:, queries], inputs.far_k[:, keys], inputs.v[:, keys])
        far, far_lse = attention(*(x.transpose(1, 2) for x in far_inputs), is_causal=True, scale=0.3)
        total = torch.logaddexp(lse[:, :, window:], far_lse)
        part = near[:, :, window:] * (lse[:, :, window:] - total).exp()[..., None] + far * (far_lse - total).exp()[..., None]
        return torch.cat((near[:, :, :window], part), 2).transpose(1, 2)

    want, _ = reference_attention(inputs, 0.3, window)
    torch.testing.assert_close(merged(inputs), want, rtol=0, atol=1e-12)
    wrong = torch.autograd.grad(merged(inputs).sin().sum(), inputs.near_q)[0]
    right = torch.autograd.grad(want.sin().sum(), inputs.near_q)[0]
    ours = torch.autograd.grad(operator.attend(inputs, 0.3, window).sin().sum(), inputs.near_q)[0]
    assert float((wrong - right).norm() / right.norm()) > 0.02
    torch.testing.assert_close(ours, right, rtol=0, atol=1e-12)
