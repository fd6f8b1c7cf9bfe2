"""Tiger (Su 2023, kexue.fm/archives/9512): the sign of the momentum, at a rate relative to the RMS of each matrix.

    m <- beta m + (1 - beta) g                      momentum first (Lion: last)
    p <- p - rate (sign(m) + decay p)

In place. A scalar argument may be a float or a tensor that broadcasts (0-dim, or one element per row).
"""

from typing import Any

from torch import Tensor

VECTOR_SHARE = 0.5
"""Gains and biases get this share of the learning rate, whatever their RMS (Amos; Su 2022, kexue.fm/archives/9344)."""

SHRINK = 0.99
"""Under `non_finite = "shrink"`: factor of the distance to the centre of the initialisation."""


def tiger_rate_and_decay(kind: str, learning_rate: float, rms: Any, floor: float, weight_decay: float) -> tuple[Any, float]:
    """The learning rate and weight decay of a tensor (Su 2023, kexue.fm/archives/9512; per row of an embedding: bojone/tiger).

    Args:
        rms: root mean square of the whole tensor or, for an embedding by rows, one for each row.
        floor: least RMS, so that a tensor of zeros is updated, which the published rule would never do; well below the RMS of
        an
            initialised tensor, for which the published rule holds unchanged.

    Raises:
        ValueError: an unknown kind.
    """
    match kind:
        case "gain" | "bias":
            return VECTOR_SHARE * learning_rate, 0.0
        case "matrix" | "embedding":
            return learning_rate * (rms.clamp(min=floor) if isinstance(rms, Tensor) else max(rms, floor)), weight_decay
        case _:
            raise ValueError(f"a parameter is a matrix, embedding, gain or bias, got {kind!r}: say so where it is made")


def accumulate_(momentum: Tensor, gradient: Tensor | None, beta: float, weight: Any) -> None:
    """momentum <- beta momentum + weight gradient. Without a gradient (it was not finite) the momentum only decays.

    Accumulation over K micro-batches in this buffer is exact (Su 2021, kexue.fm/archives/8634) with beta on the first of them
    and 1 on the others, so that momentum decays once per step, and with weight (1 - beta) / K on each.
    """
    if gradient is not None and not isinstance(weight, Tensor) and weight == 1.0 - beta:
        momentum.lerp_(gradient, weight)  # one pass for the usual case
        return
    if beta != 1.0:
        momentum.mul_(beta)
    if gradient is None:
        return
    if isinstance(weight, Tensor):
        momentum.add_(gradient * weight)
    else:
        momentum.add_(gradient, alpha=weight)


def apply_sign_(values: Tensor, momentum: Tensor, rate: Any, decay: float) -> None:
    """values <- values - rate (sign(momentum) + decay values). A rate of 0 leaves a value bit for bit as it is."""
    apply_step_(values, momentum.sign(), rate, decay)


def apply_step_(values: Tensor, step: Tensor, rate: Any, decay: float) -> None:
    """values <- values - rate (step + decay values); `step` is destroyed."""
    if decay:
        # Not values * (1 - rate * decay): that factor is within a few ulp of 1 in float32, and its error would not average.
        step.add_(values, alpha=decay)
    if isinstance(rate, Tensor):
        values.sub_(step.mul_(rate))
    else:
        values.sub_(step, alpha=rate)


def shrink_(values: Tensor, kind: str, bad: Any = True) -> None:
    """values <- centre + 0.99 (values - centre) if `bad`, the centre being 1 for a gain and 0 otherwise (Su 2023)."""
    if isinstance(bad, Tensor):
        lost = bad.to(values.dtype) * (1.0 - SHRINK)
        values.mul_(1.0 - lost)
        if kind == "gain":
            values.add_(lost)
    elif bad:
        values.mul_(SHRINK)
        if kind == "gain":
            values.add_(1.0 - SHRINK)
