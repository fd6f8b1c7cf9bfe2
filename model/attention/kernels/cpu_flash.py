"""Attention of bfloat16 on a CPU as one compiled kernel: every window, both regions, packed documents, fewer queries than keys.

model/attention/kernels/cpu_flash.cpp holds it. Where blocks are compiled, so is this, by Inductor's own compiler, flags and
cache; it keeps no probabilities and takes a third to a half of the time of model/attention/kernels/cpu_dense.py and of torch's
fused kernel (benchmarks/LOG.md). Its gradients of keys and values err half as much as that kernel's. Head dims are multiples
of 16, the float32 lanes of an AVX-512 register.
"""

import ctypes
import functools
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from model.attention.kernels.inputs import AttentionInputs, boundaries_on_host
from model.positions.packing import PackedDocuments

FLAGS = ("-ffp-contract=fast",)  # fused multiply-add, which Inductor forbids in its own kernels


class _Sizes(ctypes.Structure):
    """Sizes of cpu_flash.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("documents", "longest", "heads", "key_heads", "width", "value_width", "window")),
        ("scale", ctypes.c_float),
    ]


@functools.cache
def library(flags: tuple[str, ...] = FLAGS) -> ctypes.CDLL:
    """The kernel, compiled at the first call on this computer."""
    from torch._inductor.codecache import CppCodeCache  # takes a second

    return CppCodeCache.load(Path(__file__).with_suffix(".cpp").read_text(), extra_flags=flags)


def forward(
    inputs: AttentionInputs, scale: float, window: int | None, documents: PackedDocuments | None
) -> tuple[Tensor, Tensor]:
    """Output [B, C, n, Hv] and log-sum-exp [B, C, n]; arguments as model.attention.kernels.reference.reference_attention."""
    inputs = inputs.map(Tensor.contiguous)
    B, C, n, _ = inputs.near_q.shape
    out, lse = inputs.v.new_empty(B, C, n, inputs.v.shape[-1]), inputs.v.new_empty(B, C, n, dtype=torch.float32)
    library().attention_forward(*_arguments(inputs, scale, window, documents), _address(inputs.v), _address(out), _address(lse))
    return out, lse


def backward(
    grad: Tensor,
    inputs: AttentionInputs,
    out: Tensor,
    lse: Tensor,
    scale: float,
    window: int | None,
    documents: PackedDocuments | None,
) -> AttentionInputs:
    """Gradients from grad and out [B, C, n, Hv] and lse [B, C, n]."""
    inputs, grad = inputs.map(Tensor.contiguous), grad.contiguous()  # names keep the copies alive: the kernel has addresses
    gradients = inputs.map(torch.empty_like)
    library().attention_backward(
        *_arguments(inputs, scale, window, documents), _address(inputs.v), _address(out), _address(lse),
        _address(grad), _addresses(gradients.near_q, gradients.far_q),
        _addresses(gradients.near_k, gradients.far_k), _address(gradients.v),
    )  # fmt: skip
    return gradients


def _arguments(inputs: AttentionInputs, scale: float, window: int | None, documents: PackedDocuments | None) -> tuple:
    """The first arguments of both calls. ctypes keeps what they point to alive for the call."""
    n, H = inputs.near_q.shape[2:]
    query_bounds, bounds = boundaries_on_host(inputs, documents)
    longest = max(end - start for start, end in pairwise(bounds))
    sizes = _Sizes(len(bounds) - 1, longest, n, inputs.v.shape[2], H, inputs.v.shape[-1], window or 0, scale)
    return (
        ctypes.byref(sizes),
        (ctypes.c_int64 * len(query_bounds))(*query_bounds),
        (ctypes.c_int64 * len(bounds))(*bounds),
        _addresses(inputs.near_q, inputs.far_q),
        _addresses(inputs.near_k, inputs.far_k),
    )


def _address(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def _addresses(near: Tensor, far: Tensor | None) -> ctypes.Array:
    return (ctypes.c_void_p * 2)(_address(near), _address(far))
