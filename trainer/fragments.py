"""What an optimizer sees of a parameter: a flat part of it, and where that part lies in the whole tensor.

A rank may hold a whole tensor (one process, fold), a tensor-parallel slice of it, or, under ZeRO, a run of flat numbers
of that slice which may begin and end in the middle of a row.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from model.layers import Logical, full_slice
from model.parallel import Topology


@dataclass
class Fragment:
    """A contiguous flat part of this tensor-parallel rank's slice of a parameter."""

    name: str
    kind: str
    """matrix, embedding, gain or bias: said where the parameter is made."""
    shape: tuple[int, ...]
    """Of the full tensor."""
    slice_shape: tuple[int, ...]
    """Of this tensor-parallel rank's slice."""
    slice_start: tuple[int, ...]
    """Where the slice begins in the full tensor."""
    replicated: bool
    """Every tensor-parallel rank holds the same values."""
    offset: int
    """Of values[0] in the flattened slice."""
    values: Tensor
    """Flat and writable; empty on a rank that holds nothing of this parameter."""
    gradient: Tensor | None
    """Flat, as long as values; None where it is in the momentum already (fold)."""
    state: dict[str, Tensor] = field(default_factory=dict)
    """momentum, second_moment: flat, as long as values; made by the optimizer when first needed."""

    @property
    def width(self) -> int:
        """Numbers in a row of the slice; a vector is one row."""
        return math.prod(self.slice_shape[1:]) if len(self.slice_shape) > 1 else max(1, math.prod(self.slice_shape))

    def momentum(self) -> Tensor:
        """First moment, zero at first."""
        return self._state("momentum")

    def second_moment(self) -> Tensor:
        """AdamW's mean of squares, zero at first."""
        return self._state("second_moment")

    def _state(self, name: str) -> Tensor:
        if name not in self.state:
            self.state[name] = torch.zeros_like(self.values)
        return self.state[name]


def whole_fragments(model: nn.Module, topology: Topology) -> list[Fragment]:
    """One fragment a parameter, each this tensor-parallel rank's whole slice; a tied weight appears once."""
    return [
        fragment_of(name, parameter.logical, topology, 0, parameter.data.view(-1))  # type: ignore[attr-defined]
        for name, parameter in model.named_parameters()
    ]


def fragment_of(
    name: str, logical: Logical, topology: Topology, offset: int, values: Tensor, gradient: Tensor | None = None
) -> Fragment:
    """A fragment whose place follows from what its parameter is and where this rank stands."""
    size = topology.tensor_parallel_size
    shape, start = full_slice(logical, size, topology.tensor_parallel_rank)
    replicated = logical.split is None and size > 1
    return Fragment(name, logical.kind, tuple(logical.shape), shape, start, replicated, offset, values, gradient)


@dataclass(frozen=True)
class Block:
    """A rectangle of a fragment: flat numbers start to stop are `rows` rows from `row`, each from `column`."""

    start: int
    stop: int
    row: int
    rows: int
    column: int

    def of(self, flat: Tensor) -> Tensor:
        """The rectangle of a flat tensor as rows x columns, a view."""
        return flat[self.start : self.stop].view(self.rows, -1)


def blocks(offset: int, numbers: int, width: int, limit: int) -> Iterator[Block]:
    """Cut flat numbers offset to offset + numbers of rows of `width` into rectangles of at most `limit` numbers.

    Rows are counted from the start of the slice. A rectangle has several rows only where they are complete.
    """
    position = 0
    while position < numbers:
        row, column = divmod(offset + position, width)
        left = numbers - position
        if column or left < width or width > limit:
            rows, count = 1, min(width - column, left, limit)
        else:
            rows = min(left, limit) // width
            count = rows * width
        yield Block(position, position + count, row, rows, column)
        position += count


def block_limit(device: torch.device) -> int:
    """Numbers handled at once: on a CPU what stays in its caches, on a GPU what hides a launch."""
    return 1 << 18 if device.type == "cpu" else 1 << 25
