"""What a parameter is: its kind, its full shape, how tensor parallelism splits it, and the values it starts with."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

ParameterKind = Literal["matrix", "embedding", "head", "gain", "bias", "expert"]
"""head: an untied head, or the projection of a tied one. expert: a matrix of a routed expert."""
MATRICES = ("matrix", "expert")
"""Kinds of matrices between two activations."""
ParameterPart = Literal["embedding", "attention", "mlp", "experts", "norms", "head"]


@dataclass(frozen=True)
class Normal:
    """Independent normal values of mean 0."""

    std: float

    @property
    def reference_rms(self) -> float:
        """RMS of the values."""
        return self.std

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """A float32 tensor of initial values on the generator's device."""
        return torch.randn(shape, generator=generator, device=generator.device).mul_(self.std)


@dataclass(frozen=True)
class Constant:
    """One value everywhere."""

    value: float
    reference_rms: float
    """RMS that the tensor is expected to reach, where `value` is 0."""

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """As Normal.draw; nothing is random."""
        return torch.full(shape, self.value, device=generator.device)


@dataclass(frozen=True)
class Orthogonal:
    """A random square matrix whose rows are orthonormal."""

    size: int

    @property
    def reference_rms(self) -> float:
        """RMS of the values."""
        return 1.0 / math.sqrt(self.size)

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """As Normal.draw: the Q of a normal matrix's QR decomposition."""
        return torch.linalg.qr(torch.randn(shape, generator=generator, device=generator.device))[0]


Initial = Normal | Constant | Orthogonal
ZEROS, ONES = Constant(0.0, 0.0), Constant(1.0, 1.0)
ZERO_CENTERED = Constant(0.0, 1.0)
"""A gain that stands for 1 + w."""


@dataclass(frozen=True)
class ParameterSpec:
    """Everything known of a parameter before it is trained. A rank may hold a slice of it."""

    kind: ParameterKind
    shape: tuple[int, ...]
    """Shape of the full tensor, over all tensor-parallel ranks."""
    split: int | None
    """Dimension split over tensor-parallel ranks; None = every rank holds the whole."""
    initial: Initial = ZEROS
    """Distribution of the initial values."""
    part: ParameterPart = "mlp"
    """The part of the network under which the parameter is counted."""
    serves_local_heads: bool = False
    """Whole on every rank and applied to the rank's own heads: its gradient is summed over tensor-parallel ranks even where
    every rank has all tokens."""
    padding: int = 0
    """Rows of zeros that memory holds behind those of `shape` and that never change: no statistic counts them, no checkpoint
    has them."""

    @property
    def elements(self) -> int:
        """Elements of the full tensor, without padding."""
        return math.prod(self.shape)

    @property
    def centre(self) -> float:
        """Mean of the initial values."""
        return self.initial.value if isinstance(self.initial, Constant) else 0.0

    @property
    def rows(self) -> int:
        """Rows that memory holds of the full tensor, with padding; a vector is one row."""
        return self.shape[0] + self.padding if len(self.shape) > 1 else 1


def set_spec(parameter: nn.Parameter, spec: ParameterSpec) -> None:
    """Attach `parameter.spec`, and to a split parameter Megatron's flag `tensor_model_parallel`, by which DeepSpeed counts it
    once per tensor-parallel rank in norms (others once)."""
    parameter.spec = spec  # type: ignore[attr-defined]
    if spec.split is not None:
        parameter.tensor_model_parallel = True  # type: ignore[attr-defined]


@dataclass(frozen=True)
class NamedTensor:
    """A tensor of the network as optimizers and checkpoints know it: a parameter, or one expert's matrix in a stack of them."""

    name: str
    spec: ParameterSpec
    start: int
    """First element in the flattened parameter of this rank."""


def set_stack(parameter: nn.Parameter, spec: ParameterSpec, experts: range) -> None:
    """Make a parameter [experts, rows, columns] the stack of these experts' matrices, each of which has the spec."""
    set_spec(parameter, spec)
    parameter.experts = experts  # type: ignore[attr-defined]
    parameter.expert_elements = math.prod(parameter.shape[1:])  # type: ignore[attr-defined]  # ZeRO 3 takes the shape away


def stacked_experts(parameter: nn.Parameter) -> range | None:
    """The experts whose matrices a parameter holds; None: it is no stack."""
    return getattr(parameter, "experts", None)


def tensors_of(name: str, parameter: nn.Parameter) -> list[NamedTensor]:
    """What a parameter of this name holds. `layer.experts.up_proj` holds `layer.experts.0.up_proj.weight` and so on."""
    spec, experts = spec_of(parameter), stacked_experts(parameter)
    if experts is None:
        return [NamedTensor(name, spec, 0)]
    (prefix, _, last), each = name.rpartition("."), parameter.expert_elements  # type: ignore[attr-defined]
    return [NamedTensor(f"{prefix}.{e}.{last}.weight", spec, index * each) for index, e in enumerate(experts)]


def spec_of(parameter: nn.Parameter) -> ParameterSpec:
    """The ParameterSpec that `set_spec` attached."""
    return parameter.spec  # type: ignore[attr-defined]


def local_slice(spec: ParameterSpec, size: int, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and start, in the full tensor, of the slice of tensor-parallel rank `rank` of `size`. With padding it may reach
    beyond the full tensor, or begin there."""
    shape, start = list(spec.shape), [0] * len(spec.shape)
    shape[0] += spec.padding
    if spec.split is not None:
        shape[spec.split] //= size
        start[spec.split] = shape[spec.split] * rank
    return tuple(shape), tuple(start)
