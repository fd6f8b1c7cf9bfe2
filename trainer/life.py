"""Whose checkpoints lie in a directory: each names the life it belongs to."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Life:
    """One course of training, from its first update through every restart to its end.

    A directory may hold checkpoints of several: of a run that was begun again, or gone back to an earlier checkpoint.
    """

    id: str = ""
    """Empty: of a checkpoint that names none."""
    source: str = ""
    """Checkpoint that the first start began from; empty = from the beginning."""
    weights_only: bool = False
    """Of the source only the weights were taken."""

    def record(self) -> dict[str, Any]:
        """For a checkpoint's manifest and RUN/life.json."""
        return asdict(self)


def life_in(record: Mapping[str, Any]) -> Life:
    """What `Life.record` wrote; of a record without it, the life without a name."""
    return Life(record.get("id", ""), record.get("source", ""), record.get("weights_only", False))
