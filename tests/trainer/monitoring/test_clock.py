"""Seconds are attributed to the names of the marks."""

import pytest
import torch

from trainer.monitoring import clock as clock_module
from trainer.monitoring.clock import Clock


def test_seconds_between_marks_add_up_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 11.0, 13.0, 13.5, 20.0, 50.0, 51.0, 60.0])
    monkeypatch.setattr(clock_module.time, "perf_counter", lambda: next(times))
    clock = Clock(torch.device("cpu"))
    for name in ("forward", "backward", "forward"):
        clock.mark(name)
    assert clock.read() == {"forward": 1.5, "backward": 2.0}, "and starts again at 20"
    clock.start()
    clock.mark("save")
    assert clock.read() == {"save": 1.0}


@pytest.mark.gpu
def test_a_gpu_is_waited_for_only_by_read() -> None:
    clock, busy = Clock(torch.device("cuda")), torch.cuda.Event()
    torch.cuda._sleep(1 << 30)
    busy.record()
    clock.mark("kernel")
    assert not busy.query()
    assert clock.read()["kernel"] > 0.1
