"""Quantities of whole tensors (RMS, gradient norm) from fragments of them: local sums, then one all-reduce a step."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.parallel import Topology
from trainer.fragments import Fragment, block_limit, blocks


@dataclass(frozen=True)
class Totals:
    """What a step must know before it moves anything. Alike on all ranks that share a tensor."""

    rms: dict[str, Any]
    """Root mean square of the full tensor by name: a float on the CPU, 0-dim on a GPU (nothing waits for the GPU)."""
    row_rms: dict[str, Tensor]
    """By name, for each row of this rank's slice, float64."""
    gradient_norm: Tensor
    """Of all gradients together, 0-dim float64; infinite or NaN if any of them is."""


def totals(
    fragments: list[Fragment],
    topology: Topology,
    *,
    sized: set[str],
    by_row: set[str],
    partitioned: bool,
    gradient_square: Any = None,
) -> Totals:
    """Sum squares over all ranks; what several ranks hold counts once.

    Args:
        fragments: the same parameters in the same order on every rank; a fragment may be empty.
        sized: names whose RMS is wanted.
        by_row: names whose row RMS is wanted.
        partitioned: fragments are cut over data-parallel ranks (ZeRO); else each data rank holds them all.
        gradient_square: this rank's share of the squared gradient norm, where gradients are gone already (fold).
    """
    device = fragments[0].values.device
    copies = 1 if partitioned else topology.data_parallel_size
    share = {f.name: 1.0 / (copies * (topology.tensor_parallel_size if f.replicated else 1)) for f in fragments}
    known = [(fragment.gradient, share[fragment.name]) for fragment in fragments if fragment.gradient is not None]
    gradient = _total(_squares(known, device))
    if gradient_square is not None:
        gradient = gradient + gradient_square
    wanted = [fragment for fragment in fragments if fragment.name in sized]
    squares = _squares([(f.values, share[f.name] / math.prod(f.shape)) for f in wanted], device)
    rows = [share[fragment.name] * _row_squares(fragment) for fragment in fragments if fragment.name in by_row]
    packed = torch.cat([gradient.view(1), squares, *rows])
    packed = packed.to(topology.device)  # NCCL cannot send what is offloaded to the CPU
    packed = topology.sum(packed, topology.world_group).to(device)

    sizes = packed[1 : 1 + len(wanted)].sqrt()
    roots: list[Any] = sizes.tolist() if device.type == "cpu" else list(sizes.float().unbind())
    return Totals(
        rms={fragment.name: root for fragment, root in zip(wanted, roots, strict=True)},
        row_rms=_row_means(fragments, by_row, packed[1 + len(wanted) :]),
        gradient_norm=packed[0].sqrt(),
    )


def _squares(weighted: list[tuple[Tensor, float]], device: torch.device) -> Tensor:
    """Weight times sum of squares of each flat tensor, float64: on a GPU by a few launches for all of them."""
    if not weighted:
        return torch.zeros(0, dtype=torch.float64, device=device)
    if device.type == "cpu":
        return torch.tensor([weight * sum_of_squares(flat) for flat, weight in weighted], dtype=torch.float64)
    norms = torch.stack(torch._foreach_norm([flat for flat, _ in weighted], dtype=torch.float32))
    return torch.stack(torch._foreach_mul(norms.double().square().unbind(), [weight for _, weight in weighted]))


def _total(squares: Tensor) -> Tensor:
    """Their sum, 0-dim; on a CPU one after another, so that it does not hang on the width of its vectors."""
    return torch.tensor(sum(squares.tolist()), dtype=torch.float64) if squares.device.type == "cpu" else squares.sum()


def sum_of_squares(flat: Tensor) -> Any:
    """A Python float on the CPU, 0-dim float64 on a GPU. Non-finite if a number is, or if squares overflow float32."""
    if flat.device.type != "cpu":
        return torch.linalg.vector_norm(flat, dtype=torch.float32).double().square()
    total = 0.0
    for part in flat.split(block_limit(flat.device)):
        part = wide(part)
        total += torch.dot(part, part).item()
    return total


def wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x.float() if x.dtype == torch.bfloat16 else x


def _row_squares(fragment: Fragment) -> Tensor:
    """For every row of the full tensor, the sum of squares of what this fragment holds of it."""
    sums = torch.zeros(fragment.shape[0], dtype=torch.float64, device=fragment.values.device)
    for block in blocks(fragment.offset, fragment.values.numel(), fragment.width, block_limit(sums.device)):
        first = fragment.slice_start[0] + block.row
        sums[first : first + block.rows] += wide(block.of(fragment.values)).square().sum(1)
    return sums


def _row_means(fragments: list[Fragment], by_row: set[str], sums: Tensor) -> dict[str, Tensor]:
    found, start = {}, 0
    for fragment in fragments:
        if fragment.name in by_row:
            first = start + fragment.slice_start[0]
            mean = sums[first : first + fragment.slice_shape[0]] / math.prod(fragment.shape[1:])
            found[fragment.name] = mean.sqrt()
            start += fragment.shape[0]
    return found
