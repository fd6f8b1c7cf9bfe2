"""torch's CPU kernel as a causal kernel: values narrower than keys, and a share of a larger softmax."""

import torch

from model.attention.kernels.cpu_sdpa import CpuSdpa
from tests.model.attention.kernels.cases import check_backend, random_inputs


def test_one_region_with_narrow_values():
    kernel = CpuSdpa()
    check_backend(
        lambda inputs, scale, window: kernel.forward(*inputs.tensors(), scale),
        lambda grad, inputs, out, lse, scale, window: type(inputs)(
            *kernel.backward(grad, *inputs.tensors(), out, lse, scale)
        ),
        random_inputs(40, far=False), None,
    )  # fmt: skip


def test_gradients_are_a_share_of_the_softmax_that_the_log_sum_exp_is_of():
    """With every log-sum-exp larger by log 2, each probability is half as large, and so is the gradient of the values."""
    kernel, inputs = CpuSdpa(), random_inputs(24, far=False).map(torch.Tensor.detach)
    out, lse = kernel.forward(*inputs.tensors(), 0.3)
    probe = torch.ones_like(out)
    whole = kernel.backward(probe, *inputs.tensors(), out, lse, 0.3)[2]
    half = kernel.backward(probe, *inputs.tensors(), out, lse + torch.tensor(2.0).log(), 0.3)[2]
    torch.testing.assert_close(half, whole / 2, rtol=1e-6, atol=1e-7)
