"""Which checkpoint a start resumes from: that of the run in the directory, of another run, or none."""

import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.storage import is_remote
from launch.checkpoints import find_checkpoint
from launch.resume import read_lineage
from launch.runtime import World
from trainer.checkpoint.api import Checkpoints
from trainer.checkpoint.lineage import Lineage, lineage_from
from trainer.config import CheckpointConfig


@dataclass(frozen=True)
class Start:
    """Which course of training a start belongs to."""

    lineage: Lineage
    resumes: bool
    """From the newest checkpoint of `lineage`; otherwise from `lineage.source` or from the beginning."""


def choose_start(
    settings: CheckpointConfig, world: World, recorded: dict[str, Any] | None, saved: Iterable[tuple[int, Lineage | None]]
) -> Start:
    """Whose checkpoints a start resumes from.

    `never` and a path say how a lineage begins: its first start. Later starts, by torchrun, by SLURM or by the same command
    typed again, resume from the newest checkpoint of that lineage; so does `auto`.

    Args:
        recorded: RUN/lineage.json, if there is one.
        saved: the checkpoints in the directory, newest first, each with its lineage; None for one that cannot be read.
    """
    record = lineage_from(recorded) if recorded else None
    again = recorded is not None and (recorded.get("launch") == world.launch if world.launch else world.restarts > 0)
    match settings.resume:
        case "never":
            if not (again and record):
                return Start(Lineage(_new_id()), False)
            return Start(record, any(lineage is None or lineage.id == record.id for _, lineage in saved))
        case "auto":
            lineages = [lineage for _, lineage in saved]
            if record is None:
                readable = next((lineage for lineage in lineages if lineage is not None), None)
                record = readable or Lineage("" if lineages else _new_id())
            return Start(record, any(lineage is None or lineage.id == record.id for lineage in lineages))
        case path:
            source, fresh = normal_path(path), settings.reset_optimizer
            same = record is not None and (record.source, record.weights_only) == (source, fresh)
            for _, lineage in saved:
                if lineage is None or (lineage.source, lineage.weights_only) != (source, fresh):
                    continue
                if record is None or not same or lineage.id == record.id:
                    return Start(lineage, True)
            return Start(record if same and record else Lineage(_new_id(), source, fresh), False)


def normal_path(path: str) -> str:
    """A checkpoint's address, the same for every way to write it."""
    return path if is_remote(path) else str(Path(path).resolve())


def _new_id() -> str:
    return uuid.uuid4().hex[:12]


@dataclass(frozen=True)
class ResumeSource:
    """The checkpoint that a run resumes from."""

    path: str = ""
    """A checkpoint that was read and found intact; empty = from the beginning."""
    weights_only: bool = False
    same_run: bool = False
    """It was saved by this run, by an earlier process."""
    remark: str = ""
    """One sentence on checkpoints of another run in the directory; empty = there are none."""


def find_source(settings: CheckpointConfig, run_dir: str, world: World, checkpoints: Checkpoints) -> ResumeSource:
    """Find an intact checkpoint to resume from, and give `checkpoints` the lineage that the run has from here on.

    Every rank calls it; rank 0 decides.

    Raises:
        ValueError, FileNotFoundError: there should be one, and is none.
    """
    first = world.rank == 0
    start = choose_start(settings, world, read_lineage(run_dir), checkpoints.lineages()) if first else None
    start = checkpoints.broadcast(start)
    assert start is not None
    checkpoints.lineage = start.lineage
    if start.resumes and (path := checkpoints.newest()):
        return ResumeSource(path, same_run=True)
    others = checkpoints.broadcast(next((step for step, _ in checkpoints.lineages()), 0) if first else 0)
    remark = (
        f"{checkpoints.address} holds checkpoints of another run, up to step {others}; they are left alone, or set aside where "
        "this one saves"
    )
    if not start.lineage.source:
        return ResumeSource(remark=remark if others else "")
    path = checkpoints.broadcast(find_checkpoint(start.lineage.source) if first else "")
    if fault := checkpoints.fault_of(path):
        raise ValueError(f"checkpoint.resume: {path} cannot be used: {fault}; give another one")
    return ResumeSource(path, start.lineage.weights_only, remark=remark if others else "")
