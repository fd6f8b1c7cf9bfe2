"""Attention of bfloat16 on a CPU as one compiled kernel: every window, both regions and packed documents.

model/flash_cpu.cpp holds it. Where blocks are compiled, so is this, by Inductor's own compiler, flags and cache; it keeps no
probabilities and takes a third to a half of the time of model/short.py and of torch's fused kernel (benchmarks/LOG.md).
Its gradients of keys and values err half as much as that kernel's.
"""

import ctypes
import functools
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from model.heads import Heads
from model.positions import Documents

LANES = 16
"""Head sizes are multiples of this."""
FLAGS = ("-ffp-contract=fast",)  # multiply and add as one instruction; Inductor forbids it to its own kernels


class _Sizes(ctypes.Structure):
    """Sizes of flash_cpu.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("documents", "longest", "heads", "key_heads", "width", "value_width", "window")),
        ("scale", ctypes.c_float),
    ]


@functools.cache
def library(flags: tuple[str, ...] = FLAGS) -> ctypes.CDLL:
    """The kernel, compiled at the first call on this computer."""
    from torch._inductor.codecache import CppCodeCache  # takes a second

    return CppCodeCache.load(Path(__file__).with_suffix(".cpp").read_text(), extra_flags=flags)


def serves(width: int, value_width: int) -> bool:
    """Whether the kernel takes bfloat16 heads of these sizes."""
    return width % LANES == 0 and value_width % LANES == 0


def forward(heads: Heads, scale: float, window: int | None, documents: Documents | None) -> tuple[Tensor, Tensor]:
    """Output [B, S, n, Hv] and log-sum-exp [B, S, n]; arguments as model.heads.reference."""
    heads = _whole(heads)
    B, S, n, _ = heads.near_q.shape
    out, lse = heads.v.new_empty(B, S, n, heads.v.shape[-1]), heads.v.new_empty(B, S, n, dtype=torch.float32)
    library().attention_forward(*_arguments(heads, scale, window, documents), _address(heads.v), _address(out), _address(lse))
    return out, lse


def backward(
    grad: Tensor, heads: Heads, out: Tensor, lse: Tensor, scale: float, window: int | None, documents: Documents | None
) -> Heads:
    """Gradients from grad and out [B, S, n, Hv] and lse [B, S, n]."""
    heads = _whole(heads)
    found = Heads(*(None if x is None else torch.empty_like(x) for x in heads.tensors()))  # type: ignore[arg-type]
    library().attention_backward(
        *_arguments(heads, scale, window, documents), _address(heads.v), _address(out), _address(lse),
        _address(grad.contiguous()), _both(found.near_q, found.far_q), _both(found.near_k, found.far_k), _address(found.v),
    )  # fmt: skip
    return found


def _whole(heads: Heads) -> Heads:
    return Heads(*(None if x is None else x.contiguous() for x in heads.tensors()))  # type: ignore[arg-type]


def _arguments(heads: Heads, scale: float, window: int | None, documents: Documents | None) -> tuple:
    """What both calls begin with. ctypes keeps what they point to alive for the call."""
    B, S, n, H = heads.near_q.shape
    bounds = [S * row for row in range(B + 1)] if documents is None else documents.boundaries.tolist()
    longest = max(end - start for start, end in pairwise(bounds))
    sizes = _Sizes(len(bounds) - 1, longest, n, heads.v.shape[2], H, heads.v.shape[-1], window or 0, scale)
    boundaries = (ctypes.c_int64 * len(bounds))(*bounds)
    return ctypes.byref(sizes), boundaries, _both(heads.near_q, heads.far_q), _both(heads.near_k, heads.far_k)


def _address(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def _both(near: Tensor, far: Tensor | None) -> ctypes.Array:
    return (ctypes.c_void_p * 2)(_address(near), _address(far))
