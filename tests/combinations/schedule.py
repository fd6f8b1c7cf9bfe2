"""The learning rate's multiplier of update n, counted from 1, from the sentences that define it.

Update n of the warm-up has n / warmup_steps of the peak; the peak stands once (but for the stable part of those that have
one); the last update has final_fraction exactly; after decay_steps updates of the fall final_fraction stands.
"""

import math
from typing import Any


def multiplier(schedule: Any, n: int, steps: int) -> float:
    """What the peak rate of update n of `steps` is multiplied by."""
    if schedule.kind == "piecewise":
        return _through(schedule.points, n)
    if n < schedule.warmup_steps:
        return n / schedule.warmup_steps
    peak = max(schedule.warmup_steps, 1)
    final, falls = schedule.final_fraction, schedule.decay_steps or steps - peak
    match schedule.kind:
        case "constant":
            return 1.0
        case "linear":
            return _line(_share(n, peak, peak + falls), final)
        case "cosine":
            return _line((1 - math.cos(math.pi * _share(n, peak, peak + falls))) / 2, final)
        case "warmup-stable-decay":
            begin = max(peak, steps - (schedule.decay_steps or max(1, steps // 5)))
            return _line(_share(n, begin, steps), final)
    raise ValueError(schedule.kind)


def _share(n: int, last_at_peak: int, first_at_final: int) -> float:
    """Part of the fall that is done, from 0 to 1."""
    if n <= last_at_peak:
        return 0.0
    return 1.0 if n >= first_at_final else (n - last_at_peak) / (first_at_final - last_at_peak)


def _line(share: float, final: float) -> float:
    return {0.0: 1.0, 1.0: final}.get(share, 1 - share * (1 - final))


def _through(points: list[tuple[int, float]], n: int) -> float:
    """Straight lines from (0, 0) through (update, multiplier), then constant."""
    before, height = 0, 0.0
    for after, value in points:
        if n < after:
            return height + (value - height) * (n - before) / (after - before)
        before, height = after, value
    return height
