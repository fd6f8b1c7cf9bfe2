"""The layers the decoder is made of, and the kit that hands them out on one device.

The decoder is written as for one device and asks a kit for its linears, norms and embeddings: this one gives torch's,
model/megatron.py gives Megatron's under the same parameter names. Every parameter says here what it is, as
`parameter.logical`.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Kind = Literal["matrix", "embedding", "gain", "bias"]


@dataclass(frozen=True)
class Logical:
    """What a parameter is, whatever part of it a rank holds."""

    kind: Kind
    shape: tuple[int, ...]
    """Shape of the full tensor, over all tensor-parallel ranks."""
    split: int | None
    """Dimension cut over tensor-parallel ranks; None = every rank holds the whole."""


def describe(parameter: nn.Parameter, kind: Kind, shape: tuple[int, ...], split: int | None) -> None:
    """Say what a parameter is. DeepSpeed counts a parameter once a tensor-parallel rank only with Megatron's flag."""
    parameter.logical = Logical(kind, shape, split)  # type: ignore[attr-defined]
    if split is not None:
        parameter.tensor_model_parallel = True  # type: ignore[attr-defined]


def full_slice(logical: Logical, size: int, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and start, in the full tensor, of what one tensor-parallel rank holds."""
    shape, start = list(logical.shape), [0] * len(logical.shape)
    if logical.split is not None:
        shape[logical.split] //= size
        start[logical.split] = shape[logical.split] * rank
    return tuple(shape), tuple(start)


def identity(x: Tensor) -> Tensor:
    """x itself."""
    return x


class Linear(nn.Linear):
    """A linear map without bias, held whole. `share` completes its gradient when tokens are split over ranks."""

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype, share: Callable[[Tensor], Tensor] = identity):
        super().__init__(inputs, outputs, bias=False, device="meta", dtype=dtype)
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=dtype))
        self.share = share
        describe(self.weight, "matrix", (outputs, inputs), None)

    def forward(self, input: Tensor) -> Tensor:
        """y_TO = x_TI W^T."""
        return F.linear(input, self.share(self.weight))


class Embedding(nn.Module):
    """Rows of vectors by token, held whole."""

    def __init__(self, rows: int, width: int, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width, dtype=dtype))
        describe(self.weight, "embedding", (rows, width), None)

    def forward(self, tokens_T: Tensor) -> Tensor:
        """x_TD."""
        return F.embedding(tokens_T, self.weight)


class Norm(nn.Module):
    """RMSNorm with a gain (Zhang and Sennrich, 2019); the mean square is taken in float32 or better."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype, share: Callable[[Tensor], Tensor] = identity):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype))
        self.eps, self.share = eps, share
        describe(self.weight, "gain", (size,), None)

    def forward(self, x: Tensor) -> Tensor:
        """x / rms(x) * gain over the last dimension, in the dtype of x."""
        wide = x.double() if x.dtype == torch.float64 else x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.share(self.weight)


class Kit:
    """Layers for one device. All are bias-free and take and give tensors with tokens first."""

    size, rank = 1, 0
    group: Any = None

    def __init__(self, dtype: torch.dtype = torch.float32):
        self.dtype = dtype

    def column(self, inputs: int, outputs: int) -> Any:
        """Linear whose outputs are split over ranks; its input has been through `enter`."""
        return Linear(inputs, outputs, self.dtype)

    def row(self, inputs: int, outputs: int) -> Any:
        """Linear whose inputs are split over ranks; its output is summed over them."""
        return Linear(inputs, outputs, self.dtype)

    def replicated(self, inputs: int, outputs: int) -> Any:
        """Linear that every rank holds whole and computes alike."""
        return Linear(inputs, outputs, self.dtype)

    def embedding(self, rows: int, width: int) -> Any:
        """Token vectors, their rows split over ranks."""
        return Embedding(rows, width, self.dtype)

    def norm(self, size: int, eps: float) -> Any:
        """RMSNorm on what `row` and `embedding` give."""
        return Norm(size, eps, self.dtype)

    def head_norm(self, size: int, eps: float) -> Any:
        """RMSNorm over head_dim inside the split region: its gain is shared by heads on different ranks."""
        return Norm(size, eps, self.dtype)

    def enter(self, x: Tensor) -> Tensor:
        """Hand a tensor that all ranks share (or split by tokens) to layers split over ranks."""
        return x

    def gather(self, x: Tensor) -> Tensor:
        """Join the last dimension of a tensor split over ranks."""
        return x

    def tokens_whole(self) -> AbstractContextManager[None]:
        """While it lasts, every rank holds all tokens of the residual stream, whatever their number: for evaluation at other
        lengths, diagnostics and decoding, which have no number of tokens that sequence parallelism could divide."""
        return nullcontext()


def serial(dtype: torch.dtype = torch.float32) -> Kit:
    """The kit of one device."""
    return Kit(dtype)
