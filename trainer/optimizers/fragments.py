"""Fragments: the part of a parameter that a rank updates, flat, and its position in the full tensor.

A rank may hold a whole tensor (one process, fold), a tensor-parallel slice of it, or, under ZeRO, a contiguous part of the
flattened slice, which may begin and end in the middle of a row.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from model.parallel.mesh import Mesh
from model.parameters import ParameterSpec, local_slice, tensors_of
from trainer.optimizers.rule import Block, Granularity, Statistic, zeros_of


@dataclass(eq=False)
class Fragment:
    """A contiguous flat part of this tensor-parallel rank's slice of a parameter."""

    name: str
    kind: str
    """matrix, embedding, gain, ..., as declared where the parameter is made."""
    shape: tuple[int, ...]
    """Of the full tensor, without padding."""
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
    centre: float = 0.0
    """Mean of the initial values."""
    state: dict[str, Tensor] = field(default_factory=dict)
    """By name: flat, as long as values, or one number per row of the slice or one in all (`allocate`)."""
    granularity: dict[str, Granularity] = field(default_factory=dict)
    """Of each state."""
    padding: int = 0
    """Rows of zeros that memory holds behind those of `shape`."""

    @property
    def width(self) -> int:
        """Elements in a row of the slice; a vector is one row."""
        return math.prod(self.slice_shape[1:]) if len(self.slice_shape) > 1 else max(1, math.prod(self.slice_shape))

    @property
    def full_rows(self) -> int:
        """Rows of the full tensor, with padding."""
        return self.shape[0] + self.padding if len(self.shape) > 1 else 1

    @property
    def rows(self) -> range:
        """Rows of the full tensor that the slice has, whole or, split within rows, in part."""
        if len(self.shape) == 1:
            return range(1)
        return range(self.slice_start[0], self.slice_start[0] + self.slice_shape[0])

    def blocks(self, flat: bool) -> Iterator["FragmentBlock"]:
        """Blocks of a size that suits the device, cut at rows unless `flat`."""
        limit = block_limit(self.values.device)
        if flat:
            return flat_blocks(self.values.numel(), limit)
        return fragment_blocks(self.offset, self.values.numel(), self.width, limit)

    def factors_in(self, cut: "FragmentBlock", factor_R: Tensor) -> Tensor:
        """Those of a block, [rows, 1], or of a vector [1, elements], from those of all rows of the full tensor, or of all
        elements of a vector. The block is cut at rows."""
        start = self.slice_start[0]
        if len(self.shape) == 1:
            return factor_R[start + cut.column :][None, : cut.stop - cut.start]
        return factor_R[start + cut.row : start + cut.row + cut.rows, None]

    def allocate(self, states: Mapping[str, Granularity]) -> None:
        """Make the optimizer's states, zeros."""
        for name, granularity in states.items():
            self.state[name] = zeros_of(self.values, len(self.rows), granularity)
            self.granularity[name] = granularity


def whole_fragments(parameters: Mapping[str, nn.Parameter], mesh: Mesh) -> list[Fragment]:
    """One fragment per parameter by its name, or per expert of a stack, each this tensor-parallel rank's whole slice."""
    return [fragment for name, parameter in parameters.items() for fragment in _fragments_of(name, parameter, mesh)]


def _fragments_of(name: str, parameter: nn.Parameter, mesh: Mesh) -> list[Fragment]:
    tensors, flat = tensors_of(name, parameter), parameter.data.view(-1)
    parts = flat.split(len(flat) // len(tensors))
    return [fragment_of(tensor.name, tensor.spec, mesh, 0, part) for tensor, part in zip(tensors, parts, strict=True)]


def fragment_of(
    name: str, spec: ParameterSpec, mesh: Mesh, offset: int, values: Tensor, gradient: Tensor | None = None
) -> Fragment:
    """A fragment whose position follows from the parameter's spec and this rank's place in the mesh."""
    size = mesh.tensor.size
    shape, start = local_slice(spec, size, mesh.tensor.rank)
    replicated = spec.split is None and size > 1
    full = tuple(spec.shape)
    return Fragment(
        name, spec.kind, full, shape, start, replicated, offset, values, gradient, centre=spec.centre, padding=spec.padding
    )


@dataclass(frozen=True)
class FragmentBlock:
    """A rectangle of a fragment: elements start to stop are `rows` rows from `row` on, each from `column` on."""

    start: int
    stop: int
    row: int
    rows: int
    column: int

    def of(self, flat: Tensor) -> Tensor:
        """The rectangle of a flat tensor as rows x columns, a view."""
        part = flat if self.stop - self.start == flat.numel() else flat[self.start : self.stop]
        return part.view(self.rows, -1)


def fragment_blocks(offset: int, count: int, width: int, limit: int) -> Iterator[FragmentBlock]:
    """Cut elements offset to offset + count, in rows of `width`, into rectangles of at most `limit` elements.

    Rows are counted from the start of the slice. A rectangle has several rows only where they are complete.
    """
    position = 0
    while position < count:
        row, column = divmod(offset + position, width)
        left = count - position
        if column or left < width or width > limit:
            rows, size = 1, min(width - column, left, limit)
        else:
            rows = min(left, limit) // width
            size = rows * width
        yield FragmentBlock(position, position + size, row, rows, column)
        position += size


def flat_blocks(count: int, limit: int) -> Iterator[FragmentBlock]:
    """The same without regard to rows: each block is one row."""
    for start in range(0, count, limit):
        yield FragmentBlock(start, min(start + limit, count), 0, 1, 0)


def view(fragment: Fragment, cut: FragmentBlock, measured: Mapping[Statistic, Tensor] | None = None) -> Block:
    """A block of a fragment, its tensors views as rows x columns.

    Args:
        measured: of this parameter; rows are those of the slice.
    """
    rows = slice(cut.row, cut.row + cut.rows)

    def part(of: Tensor) -> Tensor:
        return of[rows, None] if of.ndim else of

    values, state = cut.of(fragment.values), fragment.state
    cut_state = {n: cut.of(s) if fragment.granularity[n] == "element" else part(s) for n, s in state.items()}
    gradient = torch.zeros_like(values) if fragment.gradient is None else cut.of(fragment.gradient)
    return Block(values, gradient, cut_state, {statistic: part(rms) for statistic, rms in measured.items()} if measured else {})


def block_limit(device: torch.device) -> int:
    """Elements processed at once: on a CPU what stays in its caches, on a GPU enough to hide the launch."""
    return 1 << 18 if device.type == "cpu" else 1 << 25
