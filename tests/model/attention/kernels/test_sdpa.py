"""Whole rows with one region by torch's scaled_dot_product_attention."""

import pytest
import torch

from model.attention.kernels import sdpa
from tests.model.attention.kernels.cases import error, random_inputs


def attend(inputs, scale, window, documents):
    return sdpa.sdpa_attention(inputs, scale)


def test_narrow_values_and_grouped_heads():
    assert error(attend, random_inputs(33, far=False), None) < 1e-12


def test_grouped_keys_are_repeated_where_no_kernel_takes_them(monkeypatch):
    """As on a GPU in float32, where torch would hold the scores of all pairs."""
    monkeypatch.setattr(sdpa, "_takes_grouped_heads", lambda v: False)
    calls = []
    original = torch.nn.functional.scaled_dot_product_attention

    def recorded(q, k, v, **options):
        calls.append((q.shape[1], k.shape[1], v.shape[1], options["enable_gqa"]))
        return original(q, k, v, **options)

    monkeypatch.setattr(sdpa.F, "scaled_dot_product_attention", recorded)
    assert error(attend, random_inputs(600, far=False, B=1), None) < 1e-12
    assert calls == [(4, 4, 4, False)]


@pytest.mark.gpu
def test_float32_with_grouped_keys_holds_no_matrix_of_scores_on_a_gpu():
    """The scores of four heads and 8,192 tokens would be 1.1 GB."""
    inputs = random_inputs(8192, far=False, B=1, H=64, Hv=64, dtype=torch.float32)
    inputs = inputs.map(lambda x: x.detach().cuda().requires_grad_())
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sdpa.sdpa_attention(inputs, 0.125).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 300e6
