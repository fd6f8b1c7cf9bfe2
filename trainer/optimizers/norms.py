"""RMS and gradient norm of whole tensors from fragments of them: local sums of squares, then one all-reduce per step."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.parallel.mesh import Mesh
from trainer.optimizers.fragments import Fragment, block_limit, fragment_blocks
from trainer.optimizers.torch_internals import l2_norms, scaled


@dataclass(frozen=True)
class TensorNorms:
    """What an update must know before it changes any weight. The same on all ranks that share a tensor."""

    rms: dict[str, Any]
    """Root mean square of the full tensor by name: a float on the CPU, 0-dim float32 on a GPU, which is not waited for."""
    row_rms: dict[str, Tensor]
    """By name, for each row of this rank's slice, float64."""
    gradient_norm: Tensor
    """Of all gradients together, 0-dim float64; infinite or NaN if any of them is."""


def tensor_norms(
    fragments: list[Fragment],
    mesh: Mesh,
    *,
    rms_of: set[str],
    row_rms_of: set[str],
    partitioned: bool,
    gradient_square: Any = None,
) -> TensorNorms:
    """Sum squares over all ranks; an element that several ranks hold counts once.

    Args:
        fragments: the same parameters in the same order on every rank; a fragment may be empty.
        rms_of: names of the parameters whose RMS is computed.
        row_rms_of: names of those whose RMS per row is computed.
        partitioned: fragments are cut over the ranks of mesh.partition (ZeRO); else each replica holds them all.
        gradient_square: this rank's share of the squared gradient norm, where gradients are gone already (fold).
    """
    device = fragments[0].values.device
    copies = 1 if partitioned else mesh.replicas.size
    share = {f.name: 1.0 / (copies * (mesh.tensor.size if f.replicated else 1)) for f in fragments}
    gradients = [(fragment.gradient, share[fragment.name]) for fragment in fragments if fragment.gradient is not None]
    gradient = _total(_squares(gradients, device))
    if gradient_square is not None:
        gradient = gradient + gradient_square
    scaled_fragments = [fragment for fragment in fragments if fragment.name in rms_of]
    squares = _squares([(f.values, share[f.name] / math.prod(f.shape)) for f in scaled_fragments], device)
    rows = [share[fragment.name] * _row_squares(fragment) for fragment in fragments if fragment.name in row_rms_of]
    packed = torch.cat([gradient.view(1), squares, *rows])
    packed = packed.to(mesh.device)  # NCCL cannot send what is offloaded to the CPU
    packed = mesh.world.sum(packed).to(device)

    roots = packed[1 : 1 + len(scaled_fragments)].sqrt()
    rms: list[Any] = roots.tolist() if device.type == "cpu" else list(roots.float().unbind())
    return TensorNorms(
        rms={fragment.name: value for fragment, value in zip(scaled_fragments, rms, strict=True)},
        row_rms=_row_rms(fragments, row_rms_of, packed[1 + len(scaled_fragments) :]),
        gradient_norm=packed[0].sqrt(),
    )


def _squares(weighted: list[tuple[Tensor, float]], device: torch.device) -> Tensor:
    """Weight times sum of squares of each flat tensor, float64 [tensors]: on a GPU in a few launches for all of them."""
    if not weighted:
        return torch.zeros(0, dtype=torch.float64, device=device)
    if device.type == "cpu":
        return torch.tensor([weight * sum_of_squares(flat) for flat, weight in weighted], dtype=torch.float64)
    norms = torch.stack(l2_norms([flat for flat, _ in weighted]))
    return torch.stack(scaled(norms.double().square().unbind(), [weight for _, weight in weighted]))


def _total(squares: Tensor) -> Tensor:
    """Sum, 0-dim; on a CPU in order, so that the result does not depend on the width of its vector units."""
    return torch.tensor(sum(squares.tolist()), dtype=torch.float64) if squares.device.type == "cpu" else squares.sum()


def sum_of_squares(flat: Tensor) -> Any:
    """A Python float on the CPU, 0-dim float64 on a GPU. Not finite if an element is not, or if squares overflow float32."""
    if flat.device.type != "cpu":
        return torch.linalg.vector_norm(flat, dtype=torch.float32).double().square()
    total = 0.0
    for part in flat.split(block_limit(flat.device)):
        part = at_least_float32(part)
        total += torch.dot(part, part).item()
    return total


def at_least_float32(x: Tensor) -> Tensor:
    """bfloat16 as a float32 copy; float32 and float64 as they are."""
    return x.float() if x.dtype == torch.bfloat16 else x


def _row_squares(fragment: Fragment) -> Tensor:
    """Sum of squares of what this fragment holds of every row of the full tensor, float64 [rows]."""
    sums = torch.zeros(fragment.shape[0], dtype=torch.float64, device=fragment.values.device)
    for block in fragment_blocks(fragment.offset, fragment.values.numel(), fragment.width, block_limit(sums.device)):
        first = fragment.slice_start[0] + block.row
        sums[first : first + block.rows] += at_least_float32(block.of(fragment.values)).square().sum(1)
    return sums


def _row_rms(fragments: list[Fragment], row_rms_of: set[str], sums: Tensor) -> dict[str, Tensor]:
    rms, start = {}, 0
    for fragment in fragments:
        if fragment.name in row_rms_of:
            first = start + fragment.slice_start[0]
            mean = sums[first : first + fragment.slice_shape[0]] / math.prod(fragment.shape[1:])
            rms[fragment.name] = mean.sqrt()
            start += fragment.shape[0]
    return rms
