"""Causal attention for every position map, layer pattern and device.

`attend` computes what model.attention.kernels.reference.reference_attention defines, by the backend that
model/attention/kernels/dispatch.py chooses. Backends that autograd differentiates are called directly; the others run
inside two custom operators, one for the forward and one for the backward, opaque to torch.compile, that save the rotated
queries and keys, the values, the output and its log-sum-exp.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from model.attention.kernels import cpu_dense, cpu_eager, cpu_flash, dispatch, flash, flex, sdpa, three_calls
from model.attention.kernels.cudnn import Cudnn
from model.attention.kernels.dispatch import AttentionProblem
from model.attention.kernels.inputs import AttentionInputs, accumulation_dtype
from model.positions.packing import PackedDocuments


def attend(
    inputs: AttentionInputs,
    scale: float,
    window: int | None = None,
    documents: PackedDocuments | None = None,
    compiled: bool = False,
) -> Tensor:
    """Causal attention of the last C of the S tokens of each row, its queries, over all of them.

    Args:
        inputs: rotated queries and keys, and values.
        scale: multiplies the scores.
        window: with far parts, the distance (tokens) where they take over; without, the tokens seen, itself included.
        documents: attention stays inside them.
        compiled: whether blocks are compiled: a CPU then takes its compiled kernel (model/attention/kernels/cpu_flash.py)
            where it serves, a GPU compiles the merging around cuDNN's calls.

    Returns:
        [B, C, n, Hv].

    Raises:
        ValueError: no backend serves the device, or there are more queries than keys.
    """
    match dispatch.preferred_backend(AttentionProblem.of(inputs, window, documents, compiled)):
        case "cpu_dense":
            return cpu_dense.dense_attention(inputs.near_q, inputs.near_k, inputs.v, scale)
        case "sdpa":
            return sdpa.sdpa_attention(inputs, scale)
        case "flex":
            return flex.flex_attend(inputs, scale, window, documents)
        case _:
            return torch.ops.tiglon.causal_attention(inputs.tensors(), _tensors(documents), window, scale, compiled)[0]


def attend_with_lse(
    inputs: AttentionInputs,
    scale: float,
    window: int | None = None,
    documents: PackedDocuments | None = None,
    compiled: bool = False,
) -> tuple[Tensor, Tensor]:
    """`attend`, and the natural log-sum-exp of the scaled scores [B, C, n], without a gradient.

    On a CPU the output has the same bits. On a GPU whole rows in one region are computed by the backend of a sliding window
    that is as long as the row, since torch's scaled_dot_product_attention does not return what its kernels know.
    """
    problem = replace(AttentionProblem.of(inputs, window, documents, compiled), wants_lse=True)
    match dispatch.preferred_backend(problem):
        case "cpu_dense":
            return cpu_dense.dense_attention_with_lse(inputs.near_q, inputs.near_k, inputs.v, scale)
        case "flex":
            out, lse = flex.flex_attend_with_lse(inputs, scale, window, documents)
        case backend:
            if problem.mask == "causal" and not problem.fewer_queries and backend != "cpu_flash":
                window = problem.tokens
            out, lse = torch.ops.tiglon.causal_attention(inputs.tensors(), _tensors(documents), window, scale, compiled)
    return out, lse.detach()


def _tensors(documents: PackedDocuments | None) -> list[Tensor]:
    """The tensors of documents: none for whole rows."""
    return [] if documents is None else documents.tensors()


def _documents(tensors: Sequence[Tensor]) -> PackedDocuments | None:
    """The inverse of `_tensors`."""
    return PackedDocuments(*tensors) if tensors else None


# An operator's name changes with its arguments: the compiler's cache on disk knows an operator by its name alone, and code
# that an earlier version left there would call it with the earlier arguments.
@torch.library.custom_op("tiglon::causal_attention", mutates_args=())
def _forward(
    inputs: Sequence[Tensor], documents: Sequence[Tensor], window: int | None, scale: float, compiled: bool
) -> tuple[Tensor, Tensor]:
    """Output [B, C, n, Hv] and log-sum-exp [B, C, n], from the tensors of AttentionInputs and of PackedDocuments."""
    attention, packed = AttentionInputs(*inputs), _documents(documents)
    match backend := dispatch.choose_backend(AttentionProblem.of(attention, window, packed, compiled)):
        case "cpu_tiled" | "cpu_sdpa":
            out, lse = cpu_eager.forward(attention, scale, window, packed)
        case "cpu_flash":
            out, lse = cpu_flash.forward(attention, scale, window, packed)
        case "cudnn":
            out, lse = three_calls.forward(Cudnn(), attention, scale, window, compiled)
        case "flash":
            out, lse = flash.forward(attention, scale, window, packed)
        case _:
            raise AssertionError(backend)
    return out.contiguous(), lse.contiguous()


@_forward.register_fake
def _(inputs, documents, window, scale, compiled):
    (B, C, n, _), v = inputs[0].shape, inputs[2]
    return v.new_empty(B, C, n, v.shape[-1]), v.new_empty(B, C, n, dtype=accumulation_dtype(v.dtype))


@torch.library.custom_op("tiglon::causal_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    documents: Sequence[Tensor],
    window: int | None,
    scale: float,
    compiled: bool,
) -> list[Tensor]:
    """Gradients of the inputs, from that of the output and from what the forward returned."""
    attention, packed, (out, lse) = AttentionInputs(*inputs), _documents(documents), outputs
    match backend := dispatch.choose_backend(AttentionProblem.of(attention, window, packed, compiled)):
        case "cpu_tiled" | "cpu_sdpa":
            gradients = cpu_eager.backward(grad, attention, out, lse, scale, window, packed)
        case "cpu_flash":
            gradients = cpu_flash.backward(grad, attention, out, lse, scale, window, packed)
        case "cudnn":
            gradients = three_calls.backward(Cudnn(), grad, attention, out, lse, scale, window)
        case "flash":
            gradients = flash.backward(grad, attention, out, lse, scale, window, packed)
        case _:
            raise AssertionError(backend)
    computed = [x.contiguous() for x in gradients.tensors()]
    return computed + [torch.zeros_like(x) for x in inputs[len(computed) :]]  # a row within the window has no far pair


@_backward.register_fake
def _(grad, inputs, outputs, documents, window, scale, compiled):
    return [x.new_empty(x.shape) for x in inputs]


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    attention, documents, ctx.window, ctx.scale, ctx.compiled = inputs
    ctx.counts = [len(attention), len(output), len(documents)]
    ctx.save_for_backward(*attention, *output, *documents)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad: Tensor, _lse_grad: Tensor | None) -> tuple:
    saved = iter(ctx.saved_tensors)
    inputs, outputs, documents = ([next(saved) for _ in range(count)] for count in ctx.counts)
    gradients = torch.ops.tiglon.causal_attention_backward(
        grad, inputs, outputs, documents, ctx.window, ctx.scale, ctx.compiled
    )
    return gradients, [None] * len(documents), None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
