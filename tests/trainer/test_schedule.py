import pytest

from trainer.config import ScheduleConfig
from trainer.schedule import multiplier


def factors(schedule: ScheduleConfig, steps: int, at: list[int]) -> list[float]:
    return [multiplier(schedule, step, steps) for step in at]


def test_warmup_rises_in_equal_parts_and_never_starts_at_zero():
    schedule = ScheduleConfig(kind="constant", warmup_steps=4)
    assert factors(schedule, 10, [0, 1, 2, 3, 4, 9]) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_falls_to_the_final_fraction():
    schedule = ScheduleConfig(kind="linear", warmup_steps=0, final_fraction=0.5)
    assert factors(schedule, 10, [0, 5, 10, 12]) == [1.0, 0.75, 0.5, 0.5]


def test_cosine():
    schedule = ScheduleConfig(kind="cosine", warmup_steps=2, final_fraction=0.0)
    assert factors(schedule, 10, [2, 6, 10]) == pytest.approx([1.0, 0.5, 0.0], abs=1e-15)


def test_warmup_stable_decay_falls_over_the_last_fifth():
    schedule = ScheduleConfig(kind="warmup-stable-decay", warmup_steps=2, final_fraction=0.0)
    assert factors(schedule, 100, [1, 50, 80, 90, 100]) == pytest.approx([1.0, 1.0, 1.0, 0.5, 0.0])


def test_piecewise_is_that_of_bojone_tiger():
    schedule = ScheduleConfig(kind="piecewise", points=[(40000, 1), (160000, 0.5), (640000, 0.1), (1280000, 0.01)])
    at = [0, 3, 20000, 40000, 100000, 160000, 400000, 640000, 960000, 1280000, 2000000]
    want = [0, 7.5e-5, 0.5, 1, 0.75, 0.5, 0.3, 0.1, 0.055, 0.01, 0.01]
    assert factors(schedule, 1, at) == pytest.approx(want, abs=1e-12)
    assert factors(ScheduleConfig(kind="piecewise", points=[(0, 1)]), 1, [0, 5]) == [1, 1]
