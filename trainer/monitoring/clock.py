"""How long each part of a step takes, without synchronizing the device to measure it."""

import time

import torch


class Clock:
    """Seconds between named marks. On a GPU the marks are events on its stream, read when `read` is called."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []
        self.start()

    def start(self) -> None:
        """Drop all marks and begin again."""
        self._marks = [("", self._now())]

    def mark(self, name: str) -> None:
        """Attribute the time since the last mark to `name`."""
        self._marks.append((name, self._now()))

    def read(self) -> dict[str, float]:
        """Seconds by name since `start`, which it calls again. Waits for the device."""
        if self._cuda:
            torch.cuda.synchronize()
        seconds: dict[str, float] = {}
        for (_, begin), (name, end) in zip(self._marks, self._marks[1:], strict=False):
            seconds[name] = seconds.get(name, 0.0) + self._between(begin, end)
        self.start()
        return seconds

    def _now(self) -> "float | torch.cuda.Event":
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @staticmethod
    def _between(begin: "float | torch.cuda.Event", end: "float | torch.cuda.Event") -> float:
        if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
            return begin.elapsed_time(end) / 1000.0
        assert isinstance(begin, float) and isinstance(end, float)
        return end - begin
