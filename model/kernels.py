"""Causal attention on one face, for every position map, pattern and device, at the cost of one plain causal attention.

`attend` gives what model.heads.reference defines. Whole rows with one region go to torch's own kernels. Everything else
is one pair of custom operators (forward, backward), opaque to torch.compile, that saves the rotated queries and keys, the
values, the output and its log-sum-exp. Their bodies pick a backend (model/dispatch.py).
"""

import logging
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model import dispatch, flash, flash_cpu, flex, short, squares, strips
from model.dispatch import Backend, Kind
from model.heads import Heads
from model.positions import Documents

log = logging.getLogger(__name__)

STRIPS_UP_TO = 512
"""Tokens of a row or document below which strips beat three squares on a CPU, forward and backward."""

STRIP_NUMBERS = 1 << 19
"""Scores held at once by strips (2 MiB): about what a core keeps close."""


@lru_cache(maxsize=16)
def _announce(backend: Backend, kind: str) -> None:
    log.info("attention with %s runs on %s", kind, f"cudnn {torch.backends.cudnn.version()}" if backend == "cudnn" else backend)


def attend(
    heads: Heads, scale: float, window: int | None = None, documents: Documents | None = None, compiled: bool = False
) -> Tensor:
    """Causal attention.

    Args:
        heads: rotated queries and keys, and values.
        scale: multiplies the scores.
        window: with far parts, the distance (tokens) where they take over; without, the tokens seen, itself included.
        documents: attention stays inside them.
        compiled: whether blocks are compiled: a CPU then takes its compiled kernel (model/flash_cpu.py) where it serves, a
            GPU compiles what surrounds cuDNN's squares.

    Returns:
        [B, S, n, Hv].
    """
    v, width = heads.v, heads.near_q.shape[-1]
    if not v.is_cuda:
        compiled = compiled and v.dtype == torch.bfloat16 and flash_cpu.serves(width, v.shape[-1])
    if window is None and documents is None and (v.is_cuda or not compiled):
        return plain(heads, scale)
    if v.is_cuda and dispatch.wants_flex(v.dtype, width, v.shape[-1], _kind(heads, documents), _reach(heads, window)):
        return flex.attend(heads, scale, window, documents)
    return torch.ops.tiglon.attend(*heads.tensors(), *_lists(documents), window, scale, compiled)[0]


def plain(heads: Heads, scale: float) -> Tensor:
    """One causal region over whole rows: short ones on a CPU densely, else by torch's own choice of kernel."""
    if not heads.v.is_cuda and heads.v.shape[1] <= short.UP_TO:
        return short.attend(heads.near_q, heads.near_k, heads.v, scale)
    q, k, v = (x.transpose(1, 2) for x in (heads.near_q, heads.near_k, heads.v))
    width = v.shape[-1]
    if width != q.shape[-1] and not q.is_cuda:
        v = F.pad(v, (0, q.shape[-1] - width))  # torch's CPU kernel wants equal widths, else it forms an S x S matrix
    group = q.shape[1] // k.shape[1]
    if group > 1 and not _takes_groups(v):
        k, v, group = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), 1
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=group > 1)
    return out[..., :width].transpose(1, 2)


def _takes_groups(v: Tensor) -> bool:
    """Whether torch has a fused kernel for fewer key heads than query heads. In float32 on a GPU it has none, and would
    form the S x S scores instead."""
    return not (v.is_cuda and v.dtype == torch.float32)


def _backend(heads: Heads, documents: Documents | None, window: int | None, compiled: bool) -> Backend:
    v, S = heads.v, heads.v.shape[1]
    square = S if window is None or window >= S else min(window - 1, S - window)
    return dispatch.choose(
        v.device.type, v.dtype, heads.near_q.shape[-1], v.shape[-1], _kind(heads, documents), _reach(heads, window),
        square=square, compiled=compiled,
    )  # fmt: skip


def _kind(heads: Heads, documents: Documents | None) -> Kind:
    one = "two regions" if heads.far_q is not None else "sliding window"
    return "packed documents" if documents is not None else one


def _reach(heads: Heads, window: int | None) -> int:
    return dispatch.reach(heads.v.shape[1], window, heads.far_q is not None)


def _forward(
    heads: Heads, documents: Documents | None, window: int | None, scale: float, compiled: bool
) -> tuple[Tensor, Tensor]:
    backend = _backend(heads, documents, window, compiled)
    _announce(backend, _kind(heads, documents))
    match backend:
        case "cpu":
            return _cpu_forward(heads, documents, window, scale)
        case "flash-cpu":
            return flash_cpu.forward(heads, scale, window, documents)
        case "cudnn":
            return squares.forward(squares.CudnnSquare(), heads, scale, window, compiled)
        case "flash":
            return flash.forward(heads, scale, window, documents)
        case _:
            raise AssertionError(backend)


def _backward(
    grad: Tensor, heads: Heads, out: Tensor, lse: Tensor, documents: Documents | None, window: int | None, scale: float,
    compiled: bool,
) -> Heads:  # fmt: skip
    match backend := _backend(heads, documents, window, compiled):
        case "cpu":
            return _cpu_backward(grad, heads, out, lse, documents, window, scale)
        case "flash-cpu":
            return flash_cpu.backward(grad, heads, out, lse, scale, window, documents)
        case "cudnn":
            return squares.backward(squares.CudnnSquare(), grad, heads, out, lse, scale, window)
        case "flash":
            return flash.backward(grad, heads, out, lse, scale, window, documents)
        case _:
            raise AssertionError(backend)


Piece = tuple[slice, slice]


def _pieces(heads: Heads, documents: Documents | None) -> list[Piece]:
    """Rows and tokens of everything that attends to itself alone: documents, or some rows at a time."""
    B, S, n = heads.near_q.shape[:3]
    if documents is None:
        rows = max(1, STRIP_NUMBERS // (n * strips.ROWS * S))
        return [(slice(row, row + rows), slice(0, S)) for row in range(0, B, rows)]
    bounds = documents.boundaries.tolist()
    return [
        (slice(start // S, start // S + 1), slice(start % S, start % S + end - start))
        for start, end in pairwise(bounds)
        if end > start
    ]


def _region(piece: Heads, window: int | None) -> tuple[Heads, int | None]:
    """A piece within the window has one region."""
    if window is not None and window >= piece.v.shape[1]:
        return piece.near(), None
    return piece, window


def _cpu_forward(heads: Heads, documents: Documents | None, window: int | None, scale: float) -> tuple[Tensor, Tensor]:
    B, S, n, _ = heads.near_q.shape
    wide = torch.float64 if heads.v.dtype == torch.float64 else torch.float32
    if documents is None and S > STRIPS_UP_TO:
        return squares.forward(squares.CpuSquare(), heads, scale, window)
    out, lse = heads.v.new_empty(B, S, n, heads.v.shape[-1]), heads.v.new_empty(B, S, n, dtype=wide)
    for piece in _pieces(heads, documents):
        own, own_window = _region(heads.part(*piece), window)
        if own.v.shape[1] <= STRIPS_UP_TO:
            out[piece], lse[piece] = strips.forward(own, scale, own_window)
        else:
            out[piece], lse[piece] = squares.forward(squares.CpuSquare(), own, scale, own_window)
    return out, lse


def _cpu_backward(
    grad: Tensor, heads: Heads, out: Tensor, lse: Tensor, documents: Documents | None, window: int | None, scale: float
) -> Heads:
    if documents is None and heads.v.shape[1] > STRIPS_UP_TO:
        return squares.backward(squares.CpuSquare(), grad, heads, out, lse, scale, window)
    gradients = Heads(*(None if x is None else torch.zeros_like(x) for x in heads.tensors()))  # type: ignore[arg-type]
    for piece in _pieces(heads, documents):
        own, own_window = _region(heads.part(*piece), window)
        if own.v.shape[1] <= STRIPS_UP_TO:
            part = strips.backward(grad[piece], own, out[piece], lse[piece], scale, own_window)
        else:
            part = squares.backward(squares.CpuSquare(), grad[piece], own, out[piece], lse[piece], scale, own_window)
        for whole, found in zip(gradients.tensors(), part.tensors()):
            if whole is not None and found is not None:
                whole[piece] = found
    return gradients


def _lists(documents: Documents | None) -> tuple[Tensor | None, ...]:
    if documents is None:
        return None, None, None, None
    return documents.boundaries, documents.far_queries, documents.far_keys, documents.far_boundaries


def _documents(
    boundaries: Tensor | None, far_queries: Tensor | None, far_keys: Tensor | None, far_boundaries: Tensor | None
) -> Documents | None:
    return None if boundaries is None else Documents(boundaries, far_queries, far_keys, far_boundaries)


# Its name changes when its arguments do: the compiler's cache on disk knows an operator by its name alone, and code of an
# earlier version would call it with theirs.
@torch.library.custom_op("tiglon::attend", mutates_args=())
def _operator(
    near_q: Tensor,
    near_k: Tensor,
    v: Tensor,
    far_q: Tensor | None,
    far_k: Tensor | None,
    boundaries: Tensor | None,
    far_queries: Tensor | None,
    far_keys: Tensor | None,
    far_boundaries: Tensor | None,
    window: int | None,
    scale: float,
    compiled: bool,
) -> tuple[Tensor, Tensor]:
    heads = Heads(near_q, near_k, v, far_q, far_k)
    out, lse = _forward(heads, _documents(boundaries, far_queries, far_keys, far_boundaries), window, scale, compiled)
    return out.contiguous(), lse.contiguous()


@_operator.register_fake
def _(near_q, near_k, v, far_q, far_k, boundaries, far_queries, far_keys, far_boundaries, window, scale, compiled):
    B, S, n, _ = near_q.shape
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    return v.new_empty(B, S, n, v.shape[-1]), v.new_empty(B, S, n, dtype=wide)


@torch.library.custom_op("tiglon::attend_backward", mutates_args=())
def _backward_operator(
    grad: Tensor,
    near_q: Tensor,
    near_k: Tensor,
    v: Tensor,
    far_q: Tensor | None,
    far_k: Tensor | None,
    out: Tensor,
    lse: Tensor,
    boundaries: Tensor | None,
    far_queries: Tensor | None,
    far_keys: Tensor | None,
    far_boundaries: Tensor | None,
    window: int | None,
    scale: float,
    compiled: bool,
) -> list[Tensor]:
    heads = Heads(near_q, near_k, v, far_q, far_k)
    documents = _documents(boundaries, far_queries, far_keys, far_boundaries)
    gradients = _backward(grad, heads, out, lse, documents, window, scale, compiled).tensors()
    return [
        torch.zeros_like(x) if gradient is None else gradient.contiguous()
        for x, gradient in zip(heads.tensors(), gradients)
        if x is not None
    ]


@_backward_operator.register_fake
def _(grad, near_q, near_k, v, far_q, far_k, out, lse, *rest):
    return [x.new_empty(x.shape) for x in (near_q, near_k, v, far_q, far_k) if x is not None]


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.window, ctx.scale, ctx.compiled = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad: Tensor, _lse_grad: Tensor | None) -> tuple:
    near_q, near_k, v, far_q, far_k, *packed, out, lse = ctx.saved_tensors
    gradients = torch.ops.tiglon.attend_backward(
        grad, near_q, near_k, v, far_q, far_k, out, lse, *packed, ctx.window, ctx.scale, ctx.compiled
    )
    gradients += [None] * (5 - len(gradients))
    return *gradients, None, None, None, None, None, None, None


_operator.register_autograd(_differentiate, setup_context=_save)
