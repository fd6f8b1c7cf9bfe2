"""Records to write, and a disk to fill, for tests of the metric sinks."""

from contextlib import suppress
from pathlib import Path

from data.storage import replace_file
from trainer.monitoring.config import LogConfig
from trainer.monitoring.metrics import Metrics


def lines_only(directory: Path, **settings_) -> Metrics:
    return Metrics(replace_file, directory, LogConfig(tensorboard=False), config={}, **settings_)


def fill(place: Path) -> Path:
    """Write until nothing more fits; the file to remove for room again."""
    filler = place / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(1000)):
            pass
    return filler


def large_record(step: int, loss: float) -> dict:
    """A training record of about 2 kB."""
    return {"kind": "train", "step": step, "loss": loss, **{f"more{n}": 0.5 for n in range(200)}}
