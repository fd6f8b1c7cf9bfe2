"""The layers the decoder is made of, and the kit of layers of one device.

The decoder is written as for one device and asks a kit for its linears, norms and embeddings: this one gives torch's,
model/parallel/tensor.py gives Megatron's under the same parameter names. Every parameter is described by its `spec`
(model.parameters.ParameterSpec), which is set here.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.parameters import set_spec


def identity(x: Tensor) -> Tensor:
    """x itself."""
    return x


class Linear(nn.Linear):
    """A linear map without bias, whole on every rank. `replicate` is the identity on the weight; where tokens are split over
    ranks, its backward sums their gradients."""

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype, replicate: Callable[[Tensor], Tensor] = identity):
        super().__init__(inputs, outputs, bias=False, device="meta", dtype=dtype)
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=dtype))
        self.replicate = replicate
        set_spec(self.weight, "matrix", (outputs, inputs), None)

    def forward(self, input: Tensor) -> Tensor:
        """y_TO = x_TI W^T."""
        return F.linear(input, self.replicate(self.weight))


class Embedding(nn.Module):
    """Token vectors, whole on every rank."""

    def __init__(self, rows: int, width: int, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width, dtype=dtype))
        set_spec(self.weight, "embedding", (rows, width), None)

    def forward(self, tokens_T: Tensor) -> Tensor:
        """x_TD."""
        return F.embedding(tokens_T, self.weight)


class Norm(nn.Module):
    """RMSNorm with a gain (Zhang and Sennrich 2019); its mean square is in float32 or better. `replicate` as in Linear."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype, replicate: Callable[[Tensor], Tensor] = identity):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype))
        self.eps, self.replicate = eps, replicate
        set_spec(self.weight, "gain", (size,), None)

    def forward(self, x: Tensor) -> Tensor:
        """x / rms(x) * gain over the last dimension, in the dtype of x."""
        wide = x.double() if x.dtype == torch.float64 else x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.replicate(self.weight)


class Kit:
    """The kit of layers of one device. All are bias-free; inputs and outputs have tokens first."""

    size, rank = 1, 0
    group: Any = None

    def __init__(self, dtype: torch.dtype = torch.float32):
        self.dtype = dtype

    def column(self, inputs: int, outputs: int) -> Any:
        """Linear whose outputs are split over ranks; its input comes from `column_input`."""
        return Linear(inputs, outputs, self.dtype)

    def row(self, inputs: int, outputs: int) -> Any:
        """Linear whose inputs are split over ranks; its output is summed over them."""
        return Linear(inputs, outputs, self.dtype)

    def replicated(self, inputs: int, outputs: int) -> Any:
        """Linear that is whole on every rank."""
        return Linear(inputs, outputs, self.dtype)

    def embedding(self, rows: int, width: int) -> Any:
        """Token vectors, their rows split over ranks."""
        return Embedding(rows, width, self.dtype)

    def norm(self, size: int, eps: float) -> Any:
        """RMSNorm of the residual stream, which `row` and `embedding` return."""
        return Norm(size, eps, self.dtype)

    def head_norm(self, size: int, eps: float) -> Any:
        """RMSNorm over head_dim between `column` and `row`: its gain serves heads on different ranks."""
        return Norm(size, eps, self.dtype)

    def column_input(self, x: Tensor) -> Tensor:
        """All tokens of x, which is replicated or (sequence parallel) split by tokens, as `column` layers need them. One
        call serves all column layers of an input."""
        return x

    def gather_last(self, x: Tensor) -> Tensor:
        """Join a tensor whose last dimension is split over ranks, such as a `column` layer's output."""
        return x

    def tokens_whole(self) -> AbstractContextManager[None]:
        """A context in which every rank holds all tokens of the residual stream: for evaluation at other lengths, diagnostics
        and decoding, whose numbers of tokens sequence parallelism may not divide."""
        return nullcontext()


def serial_kit(dtype: torch.dtype = torch.float32) -> Kit:
    """The kit of one device."""
    return Kit(dtype)
