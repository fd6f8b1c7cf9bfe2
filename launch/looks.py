"""A look (evaluation, sample, diagnostic) that fails is a message: the training that it looks at goes on.

Looks hold collectives, so after a failure ranks may only go on together: a rank that has failed alone and went on would
meet the others' look with its training, and the collectives of both would be taken for each other.
"""

import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch.distributed as dist

from trainer.loop import Run, RunEnded

Made = TypeVar("Made")
POLL_SECONDS = 0.5
PATIENCE_SECONDS = 15.0
"""How long a rank that failed waits for the others to fail alike: they come to the same line at about the same time, or never,
because they wait for this rank there."""
HURRY_SECONDS = 3.0
"""The same, once the run is asked to stop."""
ATTENTION, VALIDATION, SAMPLE = "attention diagnostic", "evaluation", "sample"


def at_context(context: int) -> str:
    """The name of the evaluation at a context length (tokens)."""
    return f"{VALIDATION} at context {context}"


def looked_at(step: int, records: Iterable[Mapping[str, Any]]) -> tuple[int, frozenset[str]]:
    """Which looks at a step its records hold: a run that was killed between its save and its looks makes the others."""
    names = set()
    for record in records:
        match record:
            case {"checkpoint": _}:
                pass  # of `tiglon evaluate`, which measures what it is asked to
            case {"kind": "attention"}:
                names.add(ATTENTION)
            case {"kind": "evaluate", "name": "contexts", "context": context}:
                names.add(at_context(context))
            case {"kind": "evaluate"}:
                names.add(VALIDATION)
            case {"kind": "text", "name": "sample"}:
                names.add(SAMPLE)
    return step, frozenset(names)


class Looks:
    """Runs looks of one training run.

    Args:
        run: topology, screen and stop signal are used.
        patience_seconds: how long a rank that failed waits for the others to fail alike.
    """

    def __init__(self, run: Run, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self._run, self._patience = run, patience_seconds
        self.done: tuple[int, frozenset[str]] = (0, frozenset())
        """A step, and what was looked at then before this process began."""
        self._looks = 0  # counted alike on all ranks, so that a step looked at twice (after a rewind) has another name

    def attempt(self, step: int, what: str, make: Callable[[], Made], write: Callable[[Made], None]) -> None:
        """Make something on every rank, then write it; an error of either is told and passed over.

        Args:
            step: optimizer updates done.
            what: the look, for the message.
            make: may hold collectives.
            write: may not; it may fail on one rank alone.

        Raises:
            RunEnded: `make` failed on some ranks only.
        """
        if step != self.done[0]:
            self.done = (0, frozenset())  # the run has gone on, and may come here again by a rewind
        if what in self.done[1]:
            return
        self._looks += 1
        try:
            made = make()
        except (RunEnded, dist.DistError):
            raise
        except Exception as error:
            self._tell(step, what, error)
            if not self._all_failed(f"tiglon/look/{self._looks}"):
                raise RunEnded(
                    f"step {step}: the {what} failed on rank {self._run.topology.rank} but not on all ({_first_line(error)}), "
                    "so that the ranks are no longer in step; resume from the last checkpoint"
                ) from error
            return
        try:
            write(made)
        except Exception as error:
            self._tell(step, what, error)

    def _patience_now(self) -> float:
        return self._patience if self._run.stop.requested is None else min(self._patience, HURRY_SECONDS)

    def _tell(self, step: int, what: str, error: Exception) -> None:
        traceback.print_exc()  # to the rank's log
        self._run.progress.line(f"step {step}: the {what} failed: {_first_line(error)}; training is not affected")

    def _all_failed(self, name: str) -> bool:
        """Whether every rank comes here, asked of the key-value store, since collectives may be out of step."""
        topology = self._run.topology
        if topology.world_group is None:
            return True
        keys = [f"{name}/{rank}" for rank in range(topology.world_size)]
        began = time.monotonic()
        try:
            store = topology.world_group.get_group_store()
            store.set(keys[topology.rank], "failed")
            while not (found := store.check(keys)) and time.monotonic() - began < self._patience_now():
                time.sleep(POLL_SECONDS)
            return found
        except dist.DistError:  # the rank that keeps the store is gone
            return False


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__
