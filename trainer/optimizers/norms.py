"""RMS and gradient norm of whole tensors from fragments of them: local sums of squares, then one all-reduce."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from model.parallel.mesh import Mesh
from trainer.optimizers.fragments import Fragment, block_limit, fragment_blocks
from trainer.optimizers.rule import Statistic
from trainer.optimizers.torch_internals import l2_norms, scaled

Key = tuple[str, Statistic]
"""A parameter's name, and what is measured of it."""


@dataclass(frozen=True)
class Measured:
    """Root mean squares of full tensors, the same on all ranks that share a tensor."""

    rms: Mapping[Key, Any]
    """Of a matrix a float on the CPU, 0-dim float32 on a GPU, which is not waited for; of rows float64 [rows of this rank's
    slice]."""
    gradient_norm: Tensor
    """Of all gradients together, 0-dim float64; infinite or NaN if any of them is."""

    def of(self, name: str, dtype: torch.dtype) -> dict[Statistic, Tensor]:
        """What was measured of one parameter: [rows] or 0-dim."""
        return {
            s: (rms if isinstance(rms, Tensor) else torch.tensor(rms, dtype=torch.float64)).to(dtype)
            for s, rms in self._by_name.get(name, {}).items()
        }

    @cached_property
    def _by_name(self) -> dict[str, dict[Statistic, Any]]:
        found: dict[str, dict[Statistic, Any]] = {}
        for (name, statistic), rms in self.rms.items():
            found.setdefault(name, {})[statistic] = rms
        return found

    def joined(self, other: "Measured") -> "Measured":
        """Both, with this one's gradient norm."""
        return Measured({**self.rms, **other.rms}, self.gradient_norm)

    def with_scaled_gradients(self, scale: Any) -> "Measured":
        """The same after clipping; a scale of 0 where a gradient is not finite makes a statistic 0."""
        rms = {
            key: torch.nan_to_num(torch.as_tensor(value, dtype=torch.float64), 0.0, 0.0, 0.0) * scale
            if key[1].of == "gradient"
            else value
            for key, value in self.rms.items()
        }
        return Measured(rms, self.gradient_norm)


def measure(
    fragments: Sequence[Fragment],
    mesh: Mesh,
    wanted: Mapping[Key, int],
    *,
    partitioned: bool,
    gradient_square: Any = None,
) -> Measured:
    """Sum squares over all ranks; an element that several ranks hold counts once.

    Args:
        fragments: of the parameters that this rank has; one may be empty.
        wanted: what is measured, of every parameter of the network, and how many numbers it is: 1, or the rows of the full
            tensor. The sums are packed in the order of the names, so ranks may hold different parameters.
        partitioned: fragments are cut over replicas (ZeRO); else each replica holds them all.
        gradient_square: this rank's share of the squared gradient norm, where gradients are gone already (fold); they are not
            summed then.
    """
    device, held = fragments[0].values.device, {fragment.name: fragment for fragment in fragments}
    copies = {f.name: 1 if partitioned else mesh.replicas_of(f.kind).size for f in fragments}
    share = {f.name: 1.0 / (copies[f.name] * (mesh.tensor.size if f.replicated else 1)) for f in fragments}
    gradients = fragments if gradient_square is None else []
    total = _total(_squares([(f.gradient, share[f.name]) for f in gradients if f.gradient is not None], device))
    if gradient_square is not None:
        total = total + gradient_square
    keys = sorted(wanted, key=lambda key: (key[0], key[1].of, key[1].over))
    whole, by_row = ([key for key in keys if key[1].over == over] for over in ("matrix", "row"))
    squares = _whole_squares(held, share, whole, device)
    rows = [
        _row_squares(held[name], of) * share[name] if name in held else total.new_zeros(wanted[name, of]) for name, of in by_row
    ]
    packed = torch.cat([total.view(1), squares, *rows]).to(mesh.device)  # NCCL cannot send what is offloaded to the CPU
    packed = mesh.world.sum(packed).to(device)
    total, squares, *rows = packed.split([1, len(whole), *(wanted[key] for key in by_row)])
    roots = squares.sqrt()
    rms: dict[Key, Any] = dict(zip(whole, roots.tolist() if device.type == "cpu" else roots.float().unbind(), strict=True))
    for (name, statistic), sums in zip(by_row, rows, strict=True):
        if name in held:
            rms[name, statistic] = _row_rms(held[name], sums)
    return Measured(rms, total[0].sqrt())


def _whole_squares(held: Mapping[str, Fragment], share: Mapping[str, float], keys: list[Key], device: torch.device) -> Tensor:
    """This rank's part of the mean square of each tensor, float64 [keys]; 0 of a parameter that it does not have."""
    own = [key for key in keys if key[0] in held]
    weighted = [(_tensor(held[name], of), share[name] / math.prod(held[name].shape)) for name, of in own]
    squares = _squares(weighted, device)
    if len(own) == len(keys):
        return squares
    found = dict(zip(own, squares.unbind(), strict=True))
    return torch.stack([found.get(key, torch.zeros((), dtype=torch.float64, device=device)) for key in keys])


def _row_rms(fragment: Fragment, sums: Tensor) -> Tensor:
    """Of the rows of the slice, from the sums of squares of all rows of the full tensor."""
    columns = math.prod(fragment.shape[1:] or fragment.shape)
    return (sums[fragment.rows.start : fragment.rows.stop] / columns).sqrt()


def _tensor(fragment: Fragment, statistic: Statistic) -> Tensor:
    match statistic.of:
        case "values":
            return fragment.values
        case "gradient":
            assert fragment.gradient is not None, "fold takes no rule with a statistic of the gradient"
            return fragment.gradient
        case state:
            return fragment.state[state]


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
    total, limit = 0.0, block_limit(flat.device)
    for part in flat.split(limit) if flat.numel() > limit else (flat,):  # without a view of what is whole
        part = at_least_float32(part)
        total += torch.dot(part, part).item()
    return total


def at_least_float32(x: Tensor) -> Tensor:
    """bfloat16 as a float32 copy; float32 and float64 as they are."""
    return x.float() if x.dtype == torch.bfloat16 else x


def _row_squares(fragment: Fragment, statistic: Statistic) -> Tensor:
    """Sum of squares of what this fragment holds of every row of the full tensor, float64 [rows]."""
    flat = _tensor(fragment, statistic)
    sums = torch.zeros(fragment.full_rows, dtype=torch.float64, device=flat.device)
    for block in fragment_blocks(fragment.offset, flat.numel(), fragment.width, block_limit(sums.device)):
        first = fragment.rows.start + block.row
        sums[first : first + block.rows] += at_least_float32(block.of(flat)).square().sum(1)
    return sums
