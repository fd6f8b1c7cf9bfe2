"""What a part has measured, written as soon as it is known."""

import json
import os
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

RECORDS = "gpu.jsonl"


def append(folder: Path, record: dict[str, Any]) -> None:
    """Append a line to the records of a folder; several processes may do so at once."""
    line = json.dumps(record, default=str) + "\n"
    with (folder / RECORDS).open("a+b", buffering=0) as file:
        if file.seek(0, os.SEEK_END) and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
            line = "\n" + line  # the last one was torn by a full disk or a power cut
        file.write(line.encode())  # one write of a short line in append mode is not torn apart


def read(folder: Path) -> list[dict[str, Any]]:
    """The records so far; lines that are no record are left out."""
    path, found = folder / RECORDS, []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with suppress(ValueError):
            found.append(json.loads(line))
    return [record for record in found if isinstance(record, dict) and record.keys() >= {"run", "part", "what"}]


@dataclass(frozen=True)
class Part:
    """One part at work: what it runs on, and where its figures go."""

    name: str
    run: str
    """The call of `python -m benchmarks.gpu` it belongs to: only figures of one run are put into a ratio."""
    folder: Path
    scratch: Path
    """An empty folder, removed after the part."""
    device: torch.device
    tiny: bool
    """Sizes that a CPU does in seconds."""

    def say(self, what: str, **values: Any) -> None:
        """Record one figure."""
        record = {"run": self.run, "part": self.name, "what": what, "at": round(time.time(), 1), **values}
        append(self.folder, record)
        print(json.dumps(record, default=str), flush=True)

    def attempt(self, what: str, measure: Callable[[], dict[str, Any]], **values: Any) -> None:
        """Record a figure, or the error instead of it, and continue."""
        try:
            found = measure()
        except Exception as error:
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        self.say(what, **values, **found)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, action: Callable[[], object], repeats: int = 10, warm: int = 3) -> float:
        """Of one call: the median of several, by the GPU's own clock, or by the wall's.

        The GPU is idle when a call begins, so its clock counts the host's launches too, where kernels are shorter than them.
        """
        for _ in range(warm):
            action()
        self.synchronize()
        found = [self._once(action) for _ in range(repeats)]
        return sorted(found)[len(found) // 2]

    def _once(self, action: Callable[[], object]) -> float:
        if self.device.type != "cuda":
            begin = time.perf_counter()
            action()
            return time.perf_counter() - begin
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        action()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
