"""What Newton-Schulz iterations come to without rounding: odd polynomials of singular values."""

import torch
from torch import Tensor

Polynomials = list[tuple[float, float, float]]
POLYNOMIALS: dict[str, Polynomials] = {
    "quintic": [(3.4445, -4.7750, 2.0315)],
    "classical": [(1.875, -1.25, 0.375)],
    "polar-express": [  # as published, each but the last divided by 1.01 to the power of its term
        (8.2051604, -22.901935, 16.460725), (4.0663952, -2.8611541, 0.51839952), (3.9095949, -2.8233517, 0.52503698),
        (3.285564, -2.415302, 0.48529407), (2.2778733, -1.6198218, 0.39848079), (1.8725757, -1.2307043, 0.35851616),
        (1.8564371, -1.2132393, 0.35679979), (1.875, -1.25, 0.375),
    ],
}  # fmt: skip
"""a, b, c of x <- a x + b x^3 + c x^5; the last is used for all further steps."""


def polynomials(kind: str, steps: int) -> Polynomials:
    """One for each step."""
    known = POLYNOMIALS[kind]
    return [known[min(step, len(known) - 1)] for step in range(steps)]


def by_singular_values(u: Tensor, steps: Polynomials) -> Tensor:
    """u / |u| with its singular values put through the polynomials."""
    left, s, right = torch.linalg.svd(u, full_matrices=False)
    s = s / max(s.norm().item(), 1e-7)
    for a, b, c in steps:
        s = a * s + b * s**3 + c * s**5
    return (left * s) @ right
