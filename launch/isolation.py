"""A failed observation (an evaluation, a sample or an attention diagnostic) is a message: training continues without it.

Observations hold collectives, so after a failure ranks may only continue together: a rank that failed alone and continued
would match its training's collectives with those of the other ranks' observation.
"""

import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch.distributed as dist

from model.parallel.mesh import Axis
from trainer.monitoring.signals import StopSignal
from trainer.session import RunEnded

Result = TypeVar("Result")
POLL_SECONDS = 0.5
PATIENCE_SECONDS = 15.0
"""How long a rank that failed waits for the others to fail too: they come to the same line at about the same time, or never,
because they wait for this rank there."""
HURRY_SECONDS = 3.0
"""The same, once the run is asked to stop."""
ATTENTION, SPECTRUM, VALIDATION, SAMPLE = "attention diagnostic", "spectrum diagnostic", "evaluation", "sample"


def at_context(context: int) -> str:
    """The name of the evaluation at a context length (tokens)."""
    return f"{VALIDATION} at context {context}"


def recorded_observations(step: int, records: Iterable[Mapping[str, Any]]) -> tuple[int, frozenset[str]]:
    """The step, and the names of its observations that metrics.jsonl holds.

    A run that was killed between its save and its observations makes the missing ones when it resumes.
    """
    names = set()
    for record in records:
        match record:
            case {"checkpoint": _}:
                pass  # of `tiglon evaluate`, which measures what it is asked to
            case {"kind": "attention"}:
                names.add(ATTENTION)
            case {"kind": "spectrum"}:
                names.add(SPECTRUM)
            case {"kind": "evaluate", "name": "contexts", "context": context}:
                names.add(at_context(context))
            case {"kind": "evaluate"}:
                names.add(VALIDATION)
            case {"kind": "text", "name": "sample"}:
                names.add(SAMPLE)
    return step, frozenset(names)


class LeftForStop(Exception):
    """An observation is given up because the run is asked to stop, on all ranks at the same place."""


class ObservationRunner:
    """Runs the observations of one training run.

    Args:
        world: all ranks.
        say: shows a sentence on the screen.
        stop: once it is requested, patience is shorter.
        recorded: a step, and its observations that were recorded before this process began; the same on all ranks.
        patience_seconds: how long a rank that failed waits for the others to fail too.
    """

    def __init__(
        self,
        world: Axis,
        say: Callable[[str], None],
        stop: StopSignal,
        recorded: tuple[int, frozenset[str]] = (0, frozenset()),
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> None:
        self._world, self._say, self._stop, self._recorded, self._patience = world, say, stop, recorded, patience_seconds
        self._left_at: int | None = None
        """The step at which an observation was left for a stop."""
        self._count = 0  # the same on all ranks, so that a step observed twice (after a rewind) has another key

    def run(self, step: int, name: str, compute: Callable[[], Result], write: Callable[[Result], None]) -> None:
        """Compute on every rank, then write; an error of either is shown on the screen.

        Args:
            step: optimizer updates done.
            name: of the observation, for the message.
            compute: may hold collectives.
            write: may not; it may fail on one rank alone.

        Raises:
            RunEnded: `compute` failed on some ranks only.
        """
        if step != self._recorded[0]:
            self._recorded = (0, frozenset())  # the run has left this step, and may come back to it by a rewind
        if name in self._recorded[1]:
            return
        if step == self._left_at:  # a run that resumes makes those after it behind it, as an unbroken one
            self._say(f"step {step}: the {name} is left for the stop; a run that resumes makes it")
            return
        self._count += 1
        try:
            result = compute()
        except (RunEnded, dist.DistError):
            raise
        except LeftForStop:
            self._say(f"step {step}: the {name} is left unfinished for the stop; a run that resumes makes it")
            self._left_at = step
            return
        except Exception as error:
            if not self._all_failed(f"tiglon/observation/{self._count}"):
                raise RunEnded(
                    f"step {step}: the {name} failed on rank {self._world.rank} but not on all "
                    f"({_first_line(error)}), so that the ranks are no longer in step; resume from the last checkpoint"
                ) from error
            self._report(step, name, error)
            return
        try:
            write(result)
        except Exception as error:
            self._report(step, name, error)

    def _report(self, step: int, name: str, error: Exception) -> None:
        traceback.print_exc()  # to the rank's log
        self._say(f"step {step}: the {name} failed: {_first_line(error)}; training is not affected")

    def _all_failed(self, key: str) -> bool:
        """Whether every rank comes here, asked of the key-value store, since collectives may be out of step."""
        if self._world.group is None:
            return True
        keys = [f"{key}/{rank}" for rank in range(self._world.size)]
        began = time.monotonic()
        try:
            store = self._world.group.get_group_store()
            store.set(keys[self._world.rank], "failed")
            while not (all_failed := store.check(keys)) and time.monotonic() - began < self._patience_now():
                time.sleep(POLL_SECONDS)
            return all_failed
        except dist.DistError:  # the rank that keeps the store is gone
            return False

    def _patience_now(self) -> float:
        return self._patience if self._stop.requested is None else min(self._patience, HURRY_SECONDS)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__
