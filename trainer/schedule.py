"""The learning rate as a pure function of the step: nothing to checkpoint."""

import math
from itertools import pairwise

from trainer.config import ScheduleConfig


def multiplier(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """Factor on the peak rate of the update that follows `step` finished ones, in a run of `steps`.

    The warm-up gives update number n (from 1) the factor n / warmup_steps, so that none has rate zero.
    """
    warmup = schedule.warmup_steps
    if schedule.kind == "piecewise":
        return _piecewise(schedule.points, step)
    if step < warmup:
        return (step + 1) / warmup
    final = schedule.final_fraction
    match schedule.kind:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - (1.0 - final) * _progress(step, warmup, schedule.decay_steps or steps - warmup)
        case "cosine":
            progress = _progress(step, warmup, schedule.decay_steps or steps - warmup)
            return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))
        case "warmup-stable-decay":
            length = schedule.decay_steps or max(1, steps // 5)
            return 1.0 - (1.0 - final) * _progress(step, max(warmup, steps - length), length)
        case _:
            raise ValueError(
                f"schedule.kind = '{schedule.kind}'; legal: constant, linear, cosine, warmup-stable-decay, piecewise"
            )


def _progress(step: int, start: int, length: int) -> float:
    return min(1.0, max(0, step - start) / max(1, length))


def _piecewise(points: list[tuple[int, float]], step: int) -> float:
    """Straight lines through the points, from (0, 0) unless step 0 is given, constant after the last (bojone/tiger)."""
    knots = list(points) if points[0][0] == 0 else [(0, 0.0), *points]
    for (start, low), (end, high) in pairwise(knots):
        if step < end:
            return low + (high - low) * (step - start) / (end - start)
    return knots[-1][1]
