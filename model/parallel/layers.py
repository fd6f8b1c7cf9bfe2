"""The layers the decoder is made of, and the kit of layers of one device.

The decoder is written as for one device and asks a kit for its linears, norms and embeddings: this one gives torch's,
model/parallel/tensor.py gives Megatron's under the same parameter names. The decoder says of each weight how it starts and
which part of the network it is; every parameter has that and its sizes as its `spec` (model.parameters.ParameterSpec).
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.parameters import ONES, Initial, ParameterPart, ParameterSpec, set_spec


def identity(x: Tensor) -> Tensor:
    """x itself."""
    return x


class Linear(nn.Module):
    """A linear map without bias of one rank. `replicate` is the identity on the weight; where tokens are split over ranks, its
    backward sums their gradients."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        spec: ParameterSpec,
        dtype: torch.dtype,
        replicate: Callable[[Tensor], Tensor] = identity,
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=dtype))
        self.replicate = replicate
        set_spec(self.weight, spec)

    def forward(self, x_TI: Tensor) -> Tensor:
        """y_TO = x_TI W^T."""
        return F.linear(x_TI, self.replicate(self.weight))


class Embedding(nn.Module):
    """Token vectors."""

    def __init__(self, rows: int, width: int, spec: ParameterSpec, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width, dtype=dtype))
        set_spec(self.weight, spec)

    def forward(self, tokens_T: Tensor) -> Tensor:
        """x_TD."""
        return F.embedding(tokens_T, self.weight)


class Norm(nn.Module):
    """RMSNorm with a gain (Zhang and Sennrich 2019); its mean square is in float32 or better. `replicate` as in Linear,
    `over_heads` of `Kit.head_norm`."""

    def __init__(
        self,
        size: int,
        eps: float,
        dtype: torch.dtype,
        replicate: Callable[[Tensor], Tensor] = identity,
        over_heads: bool = False,
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype))
        self.eps, self.replicate = eps, replicate
        set_spec(self.weight, ParameterSpec("gain", (size,), None, ONES, "norms", serves_local_heads=over_heads))

    def forward(self, x: Tensor) -> Tensor:
        """x / rms(x) * gain over the last dimension, in the dtype of x."""
        wide = x.double() if x.dtype == torch.float64 else x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.replicate(self.weight)


class Kit:
    """The kit of layers of one device. All are bias-free; inputs and outputs have tokens first.

    Args:
        size: above 1, the layers have the shapes of one of so many tensor-parallel ranks, and no collectives: for counting, on
            torch's meta device.
    """

    rank = 0
    group: Any = None

    def __init__(self, dtype: torch.dtype = torch.float32, size: int = 1):
        self.dtype, self.size = dtype, size

    def column(self, inputs: int, outputs: int, initial: Initial, part: ParameterPart) -> Any:
        """Linear whose outputs are split over ranks; its input comes from `column_input`."""
        spec = self._matrix(inputs, outputs, 0, initial, part)
        return Linear(inputs, outputs // self.size, spec, self.dtype)

    def row(self, inputs: int, outputs: int, initial: Initial, part: ParameterPart) -> Any:
        """Linear whose inputs are split over ranks; its output is summed over them."""
        spec = self._matrix(inputs, outputs, 1, initial, part)
        return Linear(inputs // self.size, outputs, spec, self.dtype)

    def replicated(self, inputs: int, outputs: int, initial: Initial, part: ParameterPart) -> Any:
        """Linear that is whole on every rank."""
        return Linear(inputs, outputs, self._matrix(inputs, outputs, None, initial, part), self.dtype)

    def embedding(self, rows: int, width: int, initial: Initial) -> Any:
        """Token vectors, their rows split over ranks."""
        return Embedding(rows // self.size, width, self._embedding(rows, width, initial), self.dtype)

    def norm(self, size: int, eps: float) -> Any:
        """RMSNorm of the residual stream, which `row` and `embedding` return."""
        return Norm(size, eps, self.dtype)

    def head_norm(self, size: int, eps: float) -> Any:
        """RMSNorm over head_dim between `column` and `row`: its gain serves heads on different ranks."""
        return Norm(size, eps, self.dtype, over_heads=True)

    def divide(self, key: str, count: int) -> int:
        """A rank's share of what model.`key` counts.

        Raises:
            ValueError: the ranks do not divide it.
        """
        if count % self.size:
            raise ValueError(
                f"model.{key} = {count} is not divisible by parallel.tensor_parallel_size = {self.size}; change one of them"
            )
        return count // self.size

    def _matrix(self, inputs: int, outputs: int, split: int | None, initial: Initial, part: ParameterPart) -> ParameterSpec:
        return ParameterSpec("matrix", (outputs, inputs), split if self.size > 1 else None, initial, part)

    def _embedding(self, rows: int, width: int, initial: Initial) -> ParameterSpec:
        return ParameterSpec("embedding", (rows, width), 0 if self.size > 1 else None, initial, "embedding")

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
