"""Singular values of weight matrices, however ranks hold them: entropy and the largest."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from model.parallel.mesh import Mesh
from model.parameters import MATRICES
from trainer.optimizers.fragments import Fragment
from trainer.optimizers.rule import UpdateRule
from trainer.optimizers.whole import WholeMatrices


@dataclass(frozen=True)
class Spectrum:
    """Of one matrix."""

    entropy: float
    """-sum p log p / log n with p = s^2 / sum s^2, n the shorter side: 1 = all singular values s are equal, 0 = one alone is
    not zero (Su 2025, kexue.fm/archives/10739). NaN of a matrix of zeros, or of one that cannot be decomposed."""
    largest: float
    """Singular value."""


class _Decomposed(UpdateRule):
    """By what matrices are shared out and sent: their decomposition, in the precision of the weights."""

    learning_rate: float = 1.0
    weight_decay: float = 0.0
    whole: ClassVar[bool] = True

    def whole_flops(self, rows: int, columns: int) -> float:
        short, long = sorted((rows, columns))
        return float(short * short * long)


@torch.no_grad()
def matrix_spectra(
    fragments: Sequence[Fragment], names: Sequence[str], mesh: Mesh, limit: int, beat: Callable[[], None] = lambda: None
) -> dict[str, Spectrum]:
    """Of every matrix of attention and mlp by name, the same on all ranks; all of them call it. Weights stay as they are.

    Args:
        fragments: what this rank holds of all its parameters.
        names: of all such matrices, those of other ranks' layers among them.
        limit: elements of the matrices that a rank collects at once.
        beat: called after each matrix, for the watchdog.
    """
    matrices, rule = [fragment for fragment in fragments if fragment.kind in MATRICES], _Decomposed()
    numbers = torch.zeros(len(names), 2, dtype=torch.float64, device=mesh.device)
    index = {name: number for number, name in enumerate(names)}
    whole = WholeMatrices(matrices, lambda fragment: rule, mesh, limit)
    for fragment, matrix in whole.collected(lambda fragment: fragment.values):
        numbers[index[fragment.name]] = entropy_and_largest(matrix)
        beat()
    return {name: Spectrum(*row) for name, row in zip(index, mesh.world.sum(numbers).tolist(), strict=True)}


def entropy_and_largest(matrix: Tensor) -> Tensor:
    """float64 [2] of a matrix [rows, columns]: Spectrum's two numbers.

    NaN instead of an error: its owner alone would raise it, while the other ranks wait for the sum.
    """
    try:
        s = torch.linalg.svdvals(matrix).double()
    except torch.linalg.LinAlgError:
        return torch.full((2,), math.nan, dtype=torch.float64, device=matrix.device)
    p = s.square() / s.square().sum()
    entropy = -torch.special.xlogy(p, p).sum() / max(math.log(len(s)), 1e-300)
    return torch.stack((entropy, s[0]))
