"""The layers the decoder is made of, and the kit of layers of one device.

The decoder is written as for one device and asks a kit for its linears, norms and embeddings: this one gives torch's,
model/parallel/tensor.py gives Megatron's under the same parameter names. The decoder says of each weight how it starts and
which part of the network it is; every parameter has that and its sizes as its `spec` (model.parameters.ParameterSpec).
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.parallel.context import WHOLE_SEQUENCES
from model.parallel.expert import ALL_EXPERTS
from model.parallel.pipeline import WHOLE_NETWORK
from model.parameters import (
    ONES,
    ZERO_CENTERED,
    Constant,
    Initial,
    ParameterPart,
    ParameterSpec,
    local_slice,
    set_spec,
    set_stack,
    spec_of,
)


def identity(x: Tensor) -> Tensor:
    """x itself."""
    return x


class Linear(nn.Module):
    """A linear map of one rank, with a bias [outputs] if that has a spec. `replicate` is the identity on both; where tokens are
    split over ranks, its backward sums their gradients."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        specs: tuple[ParameterSpec, ParameterSpec | None],
        dtype: torch.dtype,
        replicate: Callable[[Tensor], Tensor] = identity,
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=dtype))
        self.bias = None if specs[1] is None else nn.Parameter(torch.empty(outputs, dtype=dtype))
        self.replicate = replicate
        set_linear_specs(self, specs)

    def forward(self, x_TI: Tensor) -> Tensor:
        """y_TO = x_TI W^T + b."""
        return F.linear(x_TI, self.replicate(self.weight), None if self.bias is None else self.replicate(self.bias))


def set_linear_specs(layer: Any, specs: tuple[ParameterSpec, ParameterSpec | None]) -> None:
    """Attach the specs of `layer.weight` and, where it has one, of `layer.bias`."""
    set_spec(layer.weight, specs[0])
    if specs[1] is not None:
        set_spec(layer.bias, specs[1])


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
    `over_heads` of `Kit.head_norm`. With `zero_centered` the gain is 1 + weight, and only their product is rounded (Gemma)."""

    def __init__(
        self,
        size: int,
        eps: float,
        dtype: torch.dtype,
        replicate: Callable[[Tensor], Tensor] = identity,
        over_heads: bool = False,
        zero_centered: bool = False,
    ):
        super().__init__()
        initial = ZERO_CENTERED if zero_centered else ONES
        self.weight = nn.Parameter(torch.full((size,), initial.value, dtype=dtype))
        self.eps, self.replicate, self.zero_centered = eps, replicate, zero_centered
        set_spec(self.weight, ParameterSpec("gain", (size,), None, initial, "norms", serves_local_heads=over_heads))

    def forward(self, x: Tensor) -> Tensor:
        """x / rms(x) * gain over the last dimension, in the dtype of x."""
        wide = x.double() if x.dtype == torch.float64 else x.float()
        normed = wide * torch.rsqrt(self.mean_square(wide) + self.eps)
        if self.zero_centered:
            return (normed * (1 + self.replicate(self.weight).to(wide.dtype))).to(x.dtype)
        return normed.to(x.dtype) * self.replicate(self.weight)

    def mean_square(self, x: Tensor) -> Tensor:
        """Of the last dimension, [..., 1]."""
        return x.square().mean(-1, keepdim=True)


class SplitNorm(Norm):
    """RMSNorm over a dimension that is split over `ranks`, and its gain with it. `sum_over_ranks` has the sum over ranks as its
    gradient too: the mean square is part of what every rank returns."""

    def __init__(
        self,
        size: int,
        eps: float,
        dtype: torch.dtype,
        zero_centered: bool,
        ranks: int = 1,
        sum_over_ranks: Callable[[Tensor], Tensor] = identity,
    ):
        super().__init__(size // ranks, eps, dtype, zero_centered=zero_centered)
        self.ranks, self.sum_over_ranks = ranks, sum_over_ranks
        set_spec(self.weight, replace(spec_of(self.weight), shape=(size,), split=0 if ranks > 1 else None))

    def mean_square(self, x: Tensor) -> Tensor:
        """As Norm.mean_square, over the elements of all ranks."""
        return self.sum_over_ranks(super().mean_square(x)) / self.ranks


class Kit:
    """The kit of layers of one device. Inputs and outputs have tokens first.

    Args:
        size: above 1, the layers have the shapes of one of so many tensor-parallel ranks, and no collectives: for counting, on
            torch's meta device.
    """

    rank = 0
    group: Any = None

    def __init__(self, dtype: torch.dtype = torch.float32, size: int = 1):
        self.dtype, self.size = dtype, size
        self.context = WHOLE_SEQUENCES
        """How ranks share the tokens of a sequence."""
        self.experts = ALL_EXPERTS
        """Which experts this rank has."""
        self.pipeline = WHOLE_NETWORK
        """Which layers this rank has."""
        self.loss_scale = torch.ones(())
        """What the engine multiplies the loss by before its backward, 0-dim: what layers add to the loss is too."""

    def column(
        self, inputs: int, outputs: int, initial: Initial, part: ParameterPart, bias: bool = False, padding: int = 0
    ) -> Any:
        """Linear whose outputs, and with them its bias and `padding` more outputs that are 0, are split over ranks; its input
        comes from `column_input`."""
        specs = self._linear((outputs, inputs), 0, initial, part, bias, padding)
        return Linear(inputs, (outputs + padding) // self.size, specs, self.dtype)

    def row(
        self, inputs: int, outputs: int, initial: Initial, part: ParameterPart, bias: bool = False, summed: bool = True
    ) -> Any:
        """Linear whose inputs are split over ranks; its output is summed over them, or later by `summed_output`, and the bias
        added to the sum."""
        return Linear(inputs // self.size, outputs, self._linear((outputs, inputs), 1, initial, part, bias), self.dtype)

    def experts_column(self, experts: int, inputs: int, outputs: int, initial: Initial) -> nn.Parameter:
        """The stack [own experts, outputs, inputs] of matrices whose outputs are split over ranks."""
        return self._experts(experts, (outputs, inputs), 0, initial)

    def experts_row(self, experts: int, inputs: int, outputs: int, initial: Initial) -> nn.Parameter:
        """The stack [own experts, outputs, inputs] of matrices whose inputs are split over ranks; outputs are not summed."""
        return self._experts(experts, (outputs, inputs), 1, initial)

    def _experts(self, experts: int, shape: tuple[int, int], split: int, initial: Initial) -> nn.Parameter:
        spec = ParameterSpec("expert", shape, split if self.size > 1 else None, initial, "experts")
        own = self.experts.own(experts)
        stack = nn.Parameter(torch.empty(len(own), *local_slice(spec, self.size, 0)[0], dtype=self.dtype))
        set_stack(stack, spec, own)
        return stack

    def replicated(self, inputs: int, outputs: int, initial: Initial, part: ParameterPart, bias: bool = False) -> Any:
        """Linear that is whole on every rank."""
        return Linear(inputs, outputs, self._linear((outputs, inputs), None, initial, part, bias), self.dtype)

    def embedding(self, rows: int, width: int, initial: Initial, padding: int = 0) -> Any:
        """Token vectors, their rows and `padding` more of zeros split over ranks."""
        spec = self._embedding(rows, width, initial, padding)
        return Embedding(spec.rows // self.size, width, spec, self.dtype)

    def norm(self, size: int, eps: float, zero_centered: bool) -> Any:
        """RMSNorm of the residual stream, which `row` and `embedding` return."""
        return Norm(size, eps, self.dtype, zero_centered=zero_centered)

    def head_norm(self, size: int, eps: float, zero_centered: bool) -> Any:
        """RMSNorm over head_dim between `column` and `row`: its gain serves heads on different ranks."""
        return Norm(size, eps, self.dtype, over_heads=True, zero_centered=zero_centered)

    def split_norm(self, size: int, eps: float, zero_centered: bool) -> Any:
        """RMSNorm over all outputs of a `column` layer, those of other ranks too."""
        return SplitNorm(size, eps, self.dtype, zero_centered, self.size)

    def divide(self, key: str, count: int, advice: str = "change one of them") -> int:
        """A rank's share of what model.`key` counts.

        Raises:
            ValueError: the ranks do not divide it; `advice` is what to do.
        """
        if count % self.size:
            raise ValueError(f"model.{key} = {count} is not divisible by parallel.tensor_parallel_size = {self.size}; {advice}")
        return count // self.size

    def _linear(
        self, shape: tuple[int, int], split: int | None, initial: Initial, part: ParameterPart, bias: bool, padding: int = 0
    ) -> tuple[ParameterSpec, ParameterSpec | None]:
        """Specs of the weight [outputs, inputs] and of the bias, which starts at zero and may grow as large as the weights."""
        split = split if self.size > 1 else None
        weight = ParameterSpec("head" if part == "head" else "matrix", shape, split, initial, part, padding=padding)
        zeros = Constant(0.0, initial.reference_rms)
        return weight, ParameterSpec("bias", shape[:1], 0 if split == 0 else None, zeros, part) if bias else None

    def _embedding(self, rows: int, width: int, initial: Initial, padding: int) -> ParameterSpec:
        split = 0 if self.size > 1 else None
        return ParameterSpec("embedding", (rows, width), split, initial, "embedding", padding=padding)

    def column_input(self, x: Tensor) -> Tensor:
        """All tokens of x, which is replicated or (sequence parallel) split by tokens, as `column` layers need them. One
        call serves all column layers of an input."""
        return x

    def replicate(self, x: Tensor) -> Tensor:
        """x, the same on all ranks, for parts of a result on each of them: its gradients are summed."""
        return x

    def summed_output(self, x_TD: Tensor) -> Tensor:
        """The sum over ranks, as `row` layers return it."""
        return x_TD

    def gather_last(self, x: Tensor) -> Tensor:
        """Join a tensor whose last dimension is split over ranks, such as a `column` layer's output."""
        return x

    def stream_tokens(self, tokens: int) -> int:
        """How many of a rank's tokens its residual stream holds."""
        return tokens

    def tokens_whole(self) -> AbstractContextManager[None]:
        """A context in which every tensor-parallel rank holds all tokens of the residual stream: for evaluation at other
        lengths, diagnostics and decoding, whose numbers of tokens sequence parallelism may not divide."""
        return nullcontext()

    @contextmanager
    def sequences_whole(self) -> Iterator[None]:
        """A context in which every rank holds all tokens of a sequence, alike on all context-parallel ranks: for decoding."""
        before, self.context = self.context, WHOLE_SEQUENCES
        try:
            with self.tokens_whole():
                yield
        finally:
            self.context = before


def serial_kit(dtype: torch.dtype = torch.float32) -> Kit:
    """The kit of one device."""
    return Kit(dtype)
