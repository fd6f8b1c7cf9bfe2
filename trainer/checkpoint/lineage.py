"""To which course of training a checkpoint belongs: RUN/lineage.json, and a key of a manifest."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

_ID = re.compile(r"[A-Za-z0-9_-]{0,64}")


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
    """What `Lineage.record` wrote; of a record that names none, the lineage without a name.

    Raises:
        ValueError: for an id that is no plain name, since directories of superseded records are called by it.
    """
    if not isinstance(record, Mapping):
        raise ValueError("its lineage is no object")
    lineage = Lineage(record.get("id", ""), record.get("source", ""), record.get("weights_only", False))
    if not isinstance(lineage.id, str) or not _ID.fullmatch(lineage.id):
        raise ValueError("the id of its lineage is no plain name of letters, digits and hyphens")
    if not isinstance(lineage.source, str) or not isinstance(lineage.weights_only, bool):
        raise ValueError("its lineage has a source that is no text, or weights_only that is neither true nor false")
    return lineage


def lineage_of(extra: Mapping[str, Any]) -> Lineage:
    """Of a checkpoint, from the loop's part of its metadata; 0.1.0 called the key "life". Raises as `lineage_from`."""
    return lineage_from(extra.get("lineage", extra.get("life", {})))
