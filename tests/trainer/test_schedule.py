"""The factor of every update, against lists worked out by hand; updates count from 1."""

import math

import pytest
from pydantic import ValidationError

from tests.trainer.rules import optimizer
from trainer.config import ScheduleConfig
from trainer.schedule import multiplier


def factors(steps: int, updates: int | None = None, **schedule) -> list[float]:
    """Of updates 1 to `updates` (default: all) of a run of `steps`."""
    return [multiplier(ScheduleConfig(**schedule), step, steps) for step in range(updates or steps)]


def test_warmup_rises_in_equal_parts_from_its_first_update():
    assert factors(10, kind="constant", warmup_steps=4) == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [
        ({"warmup_steps": 0}, [1.0, 0.875, 0.75, 0.625, 0.5]),
        ({"warmup_steps": 1}, [1.0, 0.875, 0.75, 0.625, 0.5]),
        ({"warmup_steps": 2}, [0.5, 1.0, 1.0 - 0.5 / 3, 1.0 - 0.5 * (2 / 3), 0.5]),
        ({"warmup_steps": 1, "decay_steps": 2}, [1.0, 0.75, 0.5, 0.5, 0.5]),
        ({"warmup_steps": 1, "decay_steps": 8}, [1.0, 0.9375, 0.875, 0.8125, 0.75]),
        ({"warmup_steps": 10}, [0.1, 0.2, 0.3, 0.4, 0.5]),
    ],
)
def test_linear(schedule: dict, wanted: list[float]):
    assert factors(5, kind="linear", final_fraction=0.5, **schedule) == wanted


def test_cosine():
    half = math.sqrt(0.5)
    wanted = [0.5, 1.0, 0.5 + 0.5 * half, 0.5, 0.5 - 0.5 * half, 0.0]
    found = factors(6, kind="cosine", warmup_steps=2, final_fraction=0.0)
    assert found == pytest.approx(wanted, abs=1e-15) and found[1] == 1.0 and found[-1] == 0.0
    assert factors(6, kind="cosine", warmup_steps=2, decay_steps=1, final_fraction=0.3) == [0.5, 1.0, 0.3, 0.3, 0.3, 0.3]


def test_warmup_stable_decay():
    wanted = [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    assert factors(10, kind="warmup-stable-decay", warmup_steps=2, decay_steps=4, final_fraction=0.0) == wanted
    assert factors(10, kind="warmup-stable-decay", warmup_steps=2, final_fraction=0.0)[6:] == [1.0, 1.0, 0.5, 0.0]
    # a decay longer than what the warm-up leaves is shortened, and ends where it should
    assert factors(4, kind="warmup-stable-decay", warmup_steps=2, decay_steps=9, final_fraction=0.0) == [0.5, 1.0, 0.5, 0.0]


@pytest.mark.parametrize("kind", ["linear", "cosine", "warmup-stable-decay"])
@pytest.mark.parametrize(("steps", "warmup"), [(40, 5), (7, 0), (1000, 100), (12, 11)])
def test_the_peak_stands_once_and_the_last_update_has_the_final_fraction_bit_for_bit(kind: str, steps: int, warmup: int):
    for final in (0.1, 0.3, 1 / 3, 0.0):
        found = factors(steps, steps + 3, kind=kind, warmup_steps=warmup, final_fraction=final)
        peak = max(1, warmup)
        assert found[peak - 1] == 1.0 and found[steps - 1] == final and found[steps:] == [final] * 3
        assert found[:peak] == [number / peak for number in range(1, peak + 1)]
        stable = steps - max(1, steps // 5) if kind == "warmup-stable-decay" else peak
        assert found.count(1.0) == max(1, stable - peak + 1)
        assert all(a > b for a, b in zip(found[max(peak, stable) - 1 : steps], found[max(peak, stable) : steps], strict=False))


def test_piecewise_is_that_of_bojone_tiger_with_updates_counted_from_1():
    points = [(40000, 1), (160000, 0.5), (640000, 0.1), (1280000, 0.01)]
    schedule = ScheduleConfig(kind="piecewise", points=points)
    at = [1, 3, 20000, 40000, 100000, 160000, 400000, 640000, 960000, 1280000, 2000000]
    want = [2.5e-5, 7.5e-5, 0.5, 1, 0.75, 0.5, 0.3, 0.1, 0.055, 0.01, 0.01]
    assert [multiplier(schedule, number - 1, 1) for number in at] == pytest.approx(want, abs=1e-12)
    assert factors(3, kind="piecewise", points=[(0, 1)]) == [1, 1, 1]
    assert factors(4, kind="piecewise", points=[(2, 1), (4, 0.5)]) == [0.5, 1.0, 0.75, 0.5]


@pytest.mark.parametrize(
    ("points", "reason"),
    [
        ([(2, -1.0)], r"multipliers of at least 0, got -1.0 at update 2"),
        ([(-3, 1.0)], r"points must have updates of at least 0, got -3"),
        ([(2, math.inf)], "finite number"),
        ([(2, math.nan)], "finite number"),
        ([(4, 1.0), (2, 0.5)], r"increasing updates, got \[4, 2\]"),
    ],
)
def test_points_that_are_no_schedule_are_refused(points: list, reason: str):
    with pytest.raises(ValidationError, match=reason):
        ScheduleConfig(kind="piecewise", points=points)


@pytest.mark.parametrize("number", [math.inf, math.nan])
@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("tiger", "learning_rate"),
        ("lion", "weight_decay"),
        ("adamw", "eps"),
        ("tiger", "rms_floor"),
        ("tiger", "max_grad_norm"),
    ],
)
def test_numbers_of_the_optimizer_are_finite(name: str, key: str, number: float):
    with pytest.raises(ValidationError, match=rf"{key}\n.*finite number|{key}\n.*greater than"):
        optimizer(name, **{key: number})
