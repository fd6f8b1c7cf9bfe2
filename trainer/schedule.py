"""Learning-rate schedules as functions of the update's number, so that there is no state to save."""

import math
from itertools import pairwise

from trainer.config import ScheduleConfig


def multiplier(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """Factor on the peak rate of the update that follows `step` finished ones, in a run of `steps` updates.

    Counted from 1, update n of the warm-up has the factor n / warmup_steps, so that none has rate zero and update
    warmup_steps (update 1 without a warm-up) is the peak; the last update of the decay has final_fraction, bit for bit.
    """
    number, peak = step + 1, max(1, schedule.warmup_steps)
    if schedule.kind == "piecewise":
        return _piecewise(schedule.points, number)
    if number <= peak:
        return number / peak
    final = schedule.final_fraction
    match schedule.kind:
        case "constant":
            return 1.0
        case "linear":
            return _line(_decayed(number, peak, schedule.decay_steps or steps - peak), final)
        case "cosine":
            progress = _decayed(number, peak, schedule.decay_steps or steps - peak)
            return final if progress == 1.0 else final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))
        case "warmup-stable-decay":
            start = max(peak, steps - (schedule.decay_steps or max(1, steps // 5)))
            return _line(_decayed(number, start, steps - start), final)
        case _:
            raise ValueError(
                f"schedule.kind = '{schedule.kind}'; legal: constant, linear, cosine, warmup-stable-decay, piecewise"
            )


def _decayed(number: int, start: int, length: int) -> float:
    """Completed fraction of a decay of `length` updates that begins after update `start`, at update `number`."""
    return min(1.0, max(0, number - start) / max(1, length))


def _line(progress: float, final: float) -> float:
    return final if progress == 1.0 else 1.0 - (1.0 - final) * progress


def _piecewise(points: list[tuple[int, float]], number: int) -> float:
    """Straight lines through the points, from (0, 0) unless 0 is given, constant after the last (bojone/tiger)."""
    knots = list(points) if points[0][0] == 0 else [(0, 0.0), *points]
    for (start, low), (end, high) in pairwise(knots):
        if number < end:
            return low + (high - low) * (number - start) / (end - start)
    return knots[-1][1]
