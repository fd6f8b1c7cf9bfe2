"""To which course of training a checkpoint belongs: RUN/lineage.json, and a key of a manifest."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Lineage:
    """One course of training, from its first update through every restart to its end.

    A directory may hold checkpoints of several: of a run that was started anew, or from an earlier checkpoint.
    """

    id: str = ""
    """Empty for a checkpoint that names none."""
    source: str = ""
    """Checkpoint that the first start began from; empty = from step 0."""
    weights_only: bool = False
    """Only the weights of the source were loaded."""

    def record(self) -> dict[str, Any]:
        """For a checkpoint's manifest and RUN/lineage.json."""
        return asdict(self)


def lineage_from(record: Mapping[str, Any]) -> Lineage:
    """What `Lineage.record` wrote; of a record that names none, the lineage without a name."""
    return Lineage(record.get("id", ""), record.get("source", ""), record.get("weights_only", False))


def lineage_of(extra: Mapping[str, Any]) -> Lineage:
    """Of a checkpoint, from the loop's part of its metadata; 0.1.0 called the key "life"."""
    return lineage_from(extra.get("lineage", extra.get("life", {})))
