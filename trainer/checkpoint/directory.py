"""The checkpoints in a directory: which there are, to which lineage each belongs, which are removed or set aside."""

import contextlib
import re
from collections.abc import Callable, Iterator

from trainer.checkpoint.lineage import Lineage, lineage_of
from trainer.checkpoint.manifest import FILE
from trainer.checkpoint.restore import CheckpointReader
from trainer.checkpoint.store import Store

PREFIX = "step-"


def directory_name(step: int) -> str:
    """Of the checkpoint after `step` updates."""
    return f"{PREFIX}{step:08d}"


def saved_steps(store: Store) -> list[int]:
    """The steps of the complete checkpoints in a directory, oldest first."""
    matches = (re.fullmatch(rf"{PREFIX}(\d{{8,}})", name) for name in store.entries())
    steps = [int(match[1]) for match in matches if match]
    return sorted(step for step in steps if FILE in store.entries(directory_name(step)))


def newest_complete(store: Store) -> Store:
    """The checkpoint meant by a directory: itself, or the newest complete one of a run or of its directory of checkpoints.

    Raises:
        FileNotFoundError: when there is none.
    """
    for directory in (store, store.child("checkpoints")):
        if FILE in directory.entries():
            return directory
        if steps := saved_steps(directory):
            return directory.child(directory_name(steps[-1]))
    raise FileNotFoundError(
        f"{store.address} is neither a checkpoint nor a run that has one; give a run directory or step-... in it"
    )


class CheckpointDirectory:
    """What rank 0 of a run does to the directory of its checkpoints.

    Attributes:
        lineage: The run's own. Checkpoints of others are neither resumed nor pruned.
    """

    def __init__(self, store: Store, report: Callable[[str], None]) -> None:
        self.store, self.lineage = store, Lineage()
        self._report = report
        self._lineages: dict[int, Lineage] = {}

    def recover(self) -> None:
        """Clear away what a crash left half-written, half-removed or half-replaced."""
        self.store.recover(PREFIX)

    def lineages(self) -> Iterator[tuple[int, Lineage | None]]:
        """The complete checkpoints, newest first, each with its lineage; None for one that cannot be read."""
        for step in reversed(saved_steps(self.store)):
            yield step, self._lineage_of(step)

    def candidates(self) -> Iterator[tuple[int, str]]:
        """Steps of the run's own checkpoints, newest first, and of those whose manifest is damaged, with the reason."""
        for step, lineage in self.lineages():
            if lineage is None:
                yield step, _manifest_fault(self.store.child(directory_name(step)))
            elif lineage.id == self.lineage.id:
                yield step, ""

    def saved(self, step: int) -> None:
        """The run has completed a checkpoint of this step."""
        self._lineages[step] = self.lineage

    def is_foreign(self, step: int) -> bool:
        """Whether there is a checkpoint of this step that is not the run's own."""
        return step in saved_steps(self.store) and self._lineage_of(step) != self.lineage

    def set_aside_after(self, newest: int) -> None:
        """Set aside checkpoints of later steps: those of the run, which has gone back before them, and those of another run."""
        for step in saved_steps(self.store):
            if step > newest:
                why = "this run went back to before it" if self._lineage_of(step) == self.lineage else "it is of another run"
                self.store.set_aside(directory_name(step))
                self._lineages.pop(step, None)
                self._report(f"checkpoint of step {step} set aside: {why}")

    def prune(self, newest: int, keep: int, keep_every_steps: int) -> None:
        """Remove the run's checkpoints up to `newest` but for the last `keep` and the milestones (0 = none)."""
        own = [step for step in saved_steps(self.store) if step == newest or self._lineage_of(step) == self.lineage]
        for step in own[:-keep]:
            if not (keep_every_steps and step % keep_every_steps == 0):
                self.store.remove(directory_name(step))
                self._lineages.pop(step, None)

    def _lineage_of(self, step: int) -> Lineage | None:
        if step not in self._lineages:
            with contextlib.suppress(ValueError, OSError):
                meta = CheckpointReader(self.store.child(directory_name(step))).manifest.meta
                self._lineages[step] = lineage_of(meta.extra)
        return self._lineages.get(step)


def _manifest_fault(store: Store) -> str:
    try:
        _ = CheckpointReader(store).manifest
    except (ValueError, OSError) as error:
        return str(error)
    return ""
