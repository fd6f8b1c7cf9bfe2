"""How ranks split a network: the topology, and the kits that hand the decoder its layers.

The only door to Megatron-Core. The decoder is written as for one device; a kit decides what a linear is:
`serial()` gives torch's own, `tensor_parallel(topology)` Megatron's column, row and vocabulary-parallel layers under
the same parameter names. Every parameter says here what it is, as `parameter.logical`.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that neither TransformerEngine nor Apex is installed: neither is wanted
    from megatron.core import ModelParallelConfig, parallel_state
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
    from megatron.core.tensor_parallel.mappings import (
        gather_from_sequence_parallel_region,
        gather_from_tensor_model_parallel_region,
        scatter_to_sequence_parallel_region,
    )

Kind = Literal["matrix", "embedding", "gain", "bias"]


@dataclass(frozen=True)
class Logical:
    """What a parameter is, whatever part of it a rank holds."""

    kind: Kind
    shape: tuple[int, ...]
    """Shape of the full tensor, over all tensor-parallel ranks."""
    split: int | None
    """Dimension cut over tensor-parallel ranks; None = every rank holds the whole."""


@dataclass(frozen=True)
class Topology:
    """Where this rank stands. Tensor-parallel ranks are neighbours: rank = data rank * tensor size + tensor rank."""

    rank: int = 0
    world_size: int = 1
    tensor_parallel_size: int = 1
    tensor_parallel_rank: int = 0
    data_parallel_size: int = 1
    data_parallel_rank: int = 0
    tensor_group: Any = None
    data_group: Any = None
    world_group: Any = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def sum(self, tensor: Tensor, group: Any) -> Tensor:
        """Sum over a group, in place; a missing group is a group of one."""
        if group is not None:
            dist.all_reduce(tensor, group=group)
        return tensor


def make_topology(tensor_parallel_size: int, device: torch.device) -> Topology:
    """Cut the running process group into tensor- and data-parallel groups (all ranks call it; once a process).

    Raises:
        ValueError: the world size is no multiple of the tensor-parallel size.
    """
    if not dist.is_initialized():
        return Topology(device=device)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if world_size % tensor_parallel_size:
        raise ValueError(
            f"{world_size} ranks cannot form groups of parallel.tensor_parallel_size = {tensor_parallel_size}; "
            "start a multiple of it"
        )
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor_parallel_size)
    data_parallel_size = world_size // tensor_parallel_size
    return Topology(
        rank=rank,
        world_size=world_size,
        tensor_parallel_size=tensor_parallel_size,
        tensor_parallel_rank=rank % tensor_parallel_size,
        data_parallel_size=data_parallel_size,
        data_parallel_rank=rank // tensor_parallel_size,
        tensor_group=parallel_state.get_tensor_model_parallel_group() if tensor_parallel_size > 1 else None,
        data_group=parallel_state.get_data_parallel_group() if data_parallel_size > 1 else None,
        world_group=dist.group.WORLD if world_size > 1 else None,
        device=device,
    )


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


def _identity(x: Tensor) -> Tensor:
    return x


class Linear(nn.Linear):
    """A linear map without bias, held whole. `share` completes its gradient when tokens are split over ranks."""

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype, share: Callable[[Tensor], Tensor] = _identity):
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

    def __init__(self, size: int, eps: float, dtype: torch.dtype, share: Callable[[Tensor], Tensor] = _identity):
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


def serial(dtype: torch.dtype = torch.float32) -> Kit:
    """The kit of one device."""
    return Kit(dtype)


def tensor_parallel(topology: Topology, sequence_parallel: bool = False, dtype: torch.dtype = torch.float32) -> Kit:
    """The kit of a topology: Megatron's layers where the tensor-parallel size is above 1, else torch's own.

    At size 1 Megatron's layers cost twice torch's host time for a small model and change nothing.
    """
    if topology.tensor_parallel_size == 1:
        return serial(dtype)
    return _MegatronKit(topology, sequence_parallel, dtype)


class _Enter(torch.autograd.Function):
    """Identity forward, all-reduce backward.

    Megatron's own copy reduces `grad.contiguous()` but returns `grad`: for a non-contiguous gradient the sum is lost.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class _Column(ColumnParallelLinear):
    def forward(self, input_: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(input_)[0]


class _Row(RowParallelLinear):
    def forward(self, input_: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(input_.contiguous())[0]


class _VocabularyEmbedding(VocabParallelEmbedding):
    scatter = staticmethod(_identity)

    def forward(self, tokens_T: Tensor) -> Tensor:  # type: ignore[override]
        return self.scatter(super().forward(tokens_T))


class _MegatronKit(Kit):
    def __init__(self, topology: Topology, sequence_parallel: bool, dtype: torch.dtype):
        super().__init__(dtype)
        self.group = topology.tensor_group
        self.size, self.rank = topology.tensor_parallel_size, topology.tensor_parallel_rank
        self.sequence_parallel = sequence_parallel
        self.settings = ModelParallelConfig(
            tensor_model_parallel_size=self.size,
            params_dtype=dtype,
            use_cpu_initialization=True,
            perform_initialization=False,  # model/decoder.py draws every weight, for the full tensor
            gradient_accumulation_fusion=False,  # would want gradient buffers of Megatron's own
            sequence_parallel=False,  # `enter` gathers the tokens once for all the column linears behind it
        )
        # A warning about process groups would cut the compiled graph, on rank 0 only.
        torch._dynamo.config.ignore_logging_functions.add(warnings.warn)
        if sequence_parallel and topology.device.type == "cpu":
            # Megatron allocates token-split buffers on "the current CUDA device"; here that is the CPU.
            torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]

    def column(self, inputs: int, outputs: int) -> Any:
        layer = _Column(
            inputs, outputs, config=self.settings, init_method=_identity, bias=False,
            disable_grad_reduce=True, tp_group=self.group,
        )  # fmt: skip
        describe(layer.weight, "matrix", (outputs, inputs), 0)  # type: ignore[arg-type]
        return layer

    def row(self, inputs: int, outputs: int) -> Any:
        layer = _Row(
            inputs, outputs, config=self.settings, init_method=_identity, bias=False,
            input_is_parallel=True, skip_bias_add=False, tp_group=self.group,
        )  # fmt: skip
        layer.sequence_parallel = self.sequence_parallel
        describe(layer.weight, "matrix", (outputs, inputs), 1)
        return layer

    def replicated(self, inputs: int, outputs: int) -> Any:
        return Linear(inputs, outputs, self.dtype, self._share)

    def embedding(self, rows: int, width: int) -> Any:
        layer = _VocabularyEmbedding(rows, width, config=self.settings, init_method=_identity, tp_group=self.group)
        layer.scatter = self._scatter  # type: ignore[method-assign]
        describe(layer.weight, "embedding", (rows, width), 0)
        return layer

    def norm(self, size: int, eps: float) -> Any:
        return Norm(size, eps, self.dtype, self._share)

    def head_norm(self, size: int, eps: float) -> Any:
        return Norm(size, eps, self.dtype, self._complete)

    def enter(self, x: Tensor) -> Tensor:
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=self.group)
        return self._complete(x)

    def gather(self, x: Tensor) -> Tensor:
        return gather_from_tensor_model_parallel_region(x.contiguous(), group=self.group)

    def _complete(self, x: Tensor) -> Tensor:
        return _Enter.apply(x, self.group)  # type: ignore[return-value]

    def _share(self, weight: Tensor) -> Tensor:
        # With tokens split over ranks, each rank's gradient of a weight held whole covers its own tokens only.
        return self._complete(weight) if self.sequence_parallel else weight

    def _scatter(self, x_TD: Tensor) -> Tensor:
        return scatter_to_sequence_parallel_region(x_TD, group=self.group) if self.sequence_parallel else x_TD
