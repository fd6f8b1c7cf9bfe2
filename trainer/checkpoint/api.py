"""Checkpoints of a run: written beside the training, complete or invisible, any layout resumes any of them.

On disk every parameter and every optimizer state is a set of rectangles, in the files of the ranks that held them; the
manifest joins them to one full tensor by name. A rank writes its own file (trainer/checkpoint/writer.py).
"""

import contextlib
import math
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from trainer.checkpoint import writer
from trainer.checkpoint.collectives import ObjectCollectives
from trainer.checkpoint.directory import CheckpointDirectory, directory_name
from trainer.checkpoint.format import StagedTensor, tensors_to_write
from trainer.checkpoint.lineage import Lineage
from trainer.checkpoint.lock import RunLock
from trainer.checkpoint.manifest import CheckpointMeta
from trainer.checkpoint.rectangles import Shard, StepPart
from trainer.checkpoint.restore import CheckpointReader
from trainer.checkpoint.staging import Staging
from trainer.checkpoint.store import OpenStore
from trainer.config import CheckpointConfig
from trainer.monitoring.progress import plural

_HEARTBEAT_SECONDS = 0.2


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint that is known to be complete."""

    step: int
    path: str
    taken: float | None = None
    """When its state was that of the run (time.monotonic()); None = before this process began."""


class Checkpoints:
    """The checkpoints of one run, as one rank sees them. Every method is called by all ranks together.

    Args:
        open_store: Opens a directory of checkpoints, or a checkpoint, by its path or object-store address.
        directory: The run's own directory of checkpoints, on a disk; they go to `config.directory` instead if that is set.
        group: The ranks that save together, or None for one process.
        report: Takes one sentence for the log, on rank 0.
        heartbeat: Called while a save, a load or a check is in progress.

    Attributes:
        last_failure: Why the last save failed; empty if it did not.
        complete: The newest checkpoint of this run.

    Raises:
        ValueError: when the directory cannot be written, or belongs to a run that is still going.
    """

    def __init__(
        self,
        open_store: OpenStore,
        directory: str | Path,
        config: CheckpointConfig,
        group: dist.ProcessGroup | None,
        report: Callable[[str], None],
        heartbeat: Callable[[], None] = lambda: None,
    ) -> None:
        self.address = config.directory or str(directory)
        self._open_store, self._config, self._report, self._heartbeat = open_store, config, report, heartbeat
        self._ranks = ObjectCollectives(group)
        store = open_store(self.address)
        self._directory = CheckpointDirectory(store, report)
        self._lock = RunLock(Path(directory), store, report)
        self._writer = writer.CheckpointWriter(self._directory, config, self._ranks, self._lock, report)
        self._staging = Staging()
        self._thread: threading.Thread | None = None
        self._in_flight: int | None = None
        self._thread_error: Exception | None = None
        self._failures = 0
        self._is_final = False
        self.last_failure = ""
        self.complete: SavedCheckpoint | None = None
        self._is_stale = False
        self._begun = False
        refusal = self.broadcast(self._acquire_lock() if self._ranks.rank == 0 else "")
        if refusal:
            raise ValueError(refusal)

    def _acquire_lock(self) -> str:
        """Rank 0: returns a reason to refuse the run, or ""."""
        try:
            self._lock.acquire()
        except (ValueError, OSError) as error:
            return str(error)
        return ""

    @property
    def lineage(self) -> Lineage:
        """The run's own; checkpoints of others are neither resumed nor pruned."""
        return self._directory.lineage

    @lineage.setter
    def lineage(self, lineage: Lineage) -> None:
        self._directory.lineage = lineage

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        return self._ranks.broadcast(value)

    def begin(self) -> None:
        """The run begins: what a crash left half-written is cleared away. Until then nothing in the directory has changed."""
        self._begun = True
        if self._ranks.rank == 0:
            self._directory.recover()

    def reserve(self, shards: list[Shard]) -> None:
        """Allocate the host memory of asynchronous saves of these shards in a thread, so that the first save need not wait."""
        if self._config.asynchronous and self._config.every_steps:
            self._staging.reserve(tensors_to_write(shards))

    def save(self, shards: list[Shard], meta: CheckpointMeta) -> None:
        """Write a checkpoint of `meta.step`.

        An asynchronous save returns at once; the shards must stay as they are until `wait_for_copy` has returned. A save
        that fails is reported and the run continues.

        Raises:
            OSError: when `config.max_failures` saves in a row have failed.
        """
        self.wait()
        if not self._begun:
            self.begin()
        tensors = tensors_to_write(shards)
        self._in_flight = meta.step
        asynchronous = self._config.asynchronous
        if asynchronous:
            self._staging.begin(tensors)
        self._thread = threading.Thread(target=self._save, args=(tensors, meta, asynchronous), name="checkpoint", daemon=True)
        self._thread.start()
        if not asynchronous:
            self.wait()

    def save_final(self, shards: list[Shard], meta: CheckpointMeta) -> SavedCheckpoint:
        """Save, and save again, until there is a complete checkpoint of `meta.step`: after the last step there is no next save.

        Raises:
            OSError: when all attempts have failed.
        """
        for attempt in range(writer.ATTEMPTS):
            self.drain()
            self._raise_thread_error()
            if self.is_complete(meta.step):
                break
            if attempt:
                self._report_once(f"checkpoint of step {meta.step}: trying again")
                time.sleep(writer.RETRY_SECONDS)
            self._failures, self._is_final = 0, True  # max_failures does not apply here
            self.save(shards, meta)
        self.drain()
        if self.complete is not None and self.is_complete(meta.step):
            return self.complete
        raise OSError(f"step {meta.step} is not saved: {self.last_failure}; {self.describe_newest()}")

    def has(self, step: int) -> bool:
        """Whether a checkpoint of this step is complete or being written."""
        return step == self._in_flight or self.is_complete(step)

    def is_complete(self, step: int) -> bool:
        """Whether there is a complete checkpoint of this step with the state that the run now has of it."""
        return not self._is_stale and self.complete is not None and self.complete.step == step

    def describe_newest(self) -> str:
        """A sentence on what there is to resume from, without its full stop."""
        if self.complete is None:
            return f"there is no complete checkpoint of this run in {self.address}"
        return f"the newest complete checkpoint is {self.complete.path}"

    def wait_for_copy(self, before: StepPart) -> bool:
        """Return when the save in flight needs no more what that part of a step changes; whether that took waiting."""
        waited = self._staging.wait(before, self._heartbeat)
        self._raise_thread_error()
        return waited

    def wait(self) -> None:
        """Return when the save in flight is complete on all ranks; raises as `save`."""
        self.drain()
        self._raise_thread_error()
        if self._failures >= self._config.max_failures:
            raise OSError(
                f"{plural(self._failures, 'checkpoint')} in a row could not be written to {self.address}: {self.last_failure}; "
                f"the run ends (checkpoint.max_failures); {self.describe_newest()}"
            )

    def drain(self, timeout_seconds: float = math.inf) -> None:
        """Return when no save is in flight any more, or after the timeout; whether it succeeded or not."""
        end = time.monotonic() + timeout_seconds
        thread = self._thread
        while thread is not None and thread.is_alive() and time.monotonic() < end:
            thread.join(_HEARTBEAT_SECONDS)
            self._heartbeat()
        self._thread = self._in_flight = None

    def close(self) -> None:
        """Finish the save in flight and release the directory."""
        try:
            self.drain()
        finally:
            self._staging.close()
            self._lock.release(undo=not self._begun)

    def newest(self, planned_every: int = 0) -> str | None:
        """The newest intact checkpoint of this lineage, or None where it has none. Reports what it passed over and why.

        With `planned_every`, the newest of a step that this number divides comes before those that a stop has left: a run that
        was never stopped has no others. Every byte is read and checked, each rank taking its share of the files.

        Raises:
            ValueError: there are some, and none is intact.
        """
        self.drain()
        first_fault = ""
        candidates = self.broadcast(list(self._directory.candidates()) if self._ranks.rank == 0 else [])
        planned = next((candidate for candidate in candidates if planned_every and candidate[0] % planned_every == 0), None)
        for step, fault in sorted(candidates, key=lambda candidate: candidate != planned):
            path = self._directory.store.join(directory_name(step))
            fault = fault or self.fault_of(path)
            if not fault:
                return path
            self._report_once(f"checkpoint {path} is passed over: {fault}")
            first_fault = first_fault or fault
        if first_fault:
            source = self.lineage.source
            anew = f"remove them to begin again from {source}" if source else "start anew with checkpoint.resume=never"
            raise ValueError(f"no checkpoint in {self.address} is intact ({first_fault}); restore one, or {anew}")
        return None

    def fault_of(self, path: str) -> str:
        """What is wrong with a checkpoint, or ""; each rank reads its share of the files, and all get the answer."""
        fault = ""
        try:
            CheckpointReader(self._open_store(path)).verify((self._ranks.rank, self._ranks.world_size), self._heartbeat)
        except (ValueError, OSError) as error:
            fault = str(error)
        return next((text for text in self._ranks.all_gather(fault) if text), "")

    def load(self, path: str, shards: list[Shard], only: Callable[[str], bool] | None = None) -> CheckpointMeta:
        """Fill shards in place from a checkpoint, of this run or another; as CheckpointReader.load."""
        return CheckpointReader(self._open_store(path)).load(shards, only, self._heartbeat)

    def lineages(self) -> Iterator[tuple[int, Lineage | None]]:
        """The checkpoints in the directory, newest first, each with its lineage; None for one that cannot be read."""
        return self._directory.lineages()

    def continue_from(self, checkpoint: SavedCheckpoint | None, same_state: bool = False) -> None:
        """The newest checkpoint of the run is this one, or none.

        Args:
            same_state: the run continues with its state: it is of this run, which has passed over no batches since.
        """
        self.complete, self._is_stale = checkpoint, not same_state

    def rewind(self, checkpoint: SavedCheckpoint) -> None:
        """The run continues from an earlier checkpoint: a start after a kill must find none of a later step."""
        self.continue_from(checkpoint)  # the batches that its state says are next were passed over
        if self._ranks.rank == 0:
            with contextlib.suppress(OSError):  # the next save tries again
                self._directory.set_aside_after(checkpoint.step)

    def _report_once(self, sentence: str) -> None:
        if self._ranks.rank == 0:
            self._report(sentence)

    def _save(self, tensors: list[StagedTensor], meta: CheckpointMeta, asynchronous: bool) -> None:
        """All of a save, in its thread, which shares no collective with training.

        After an unforeseen error one process alone only loses the save; several ranks would take the collectives of this save
        and of the next for each other, so the run has to end.
        """
        try:
            content = self._copy(tensors) if asynchronous else tensors
            began = time.monotonic()
            fault = self._writer.write(content, meta)
        except Exception as error:
            traceback.print_exc()  # to the rank's log
            self._staging.give_up()
            fault = f"rank {self._ranks.rank}: {type(error).__name__}: {error}"
            if self._ranks.world_size > 1:
                self._failures, self.last_failure, self._thread_error = self._failures + 1, fault, error
                return
        self._failures, self.last_failure = self._failures + 1 if fault else 0, fault
        if fault:
            count = "" if self._is_final else f" ({self._failures} of {self._config.max_failures})"
            self._report_once(f"checkpoint of step {meta.step} failed{count}: {fault}")
            return
        path = self._directory.store.join(directory_name(meta.step))
        self.complete, self._is_stale = SavedCheckpoint(meta.step, path, began), False
        self._directory.saved(meta.step)
        self._report_once(f"checkpoint of step {meta.step} complete after {time.monotonic() - began:.2f} s")

    def _copy(self, tensors: list[StagedTensor]) -> list[StagedTensor] | str:
        """The tensors in host memory, or why they cannot be copied there."""
        try:
            return self._staging.copy(tensors)
        except (RuntimeError, OSError, MemoryError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            return f"rank {self._ranks.rank}: the state could not be copied to host memory ({reason})"

    def _raise_thread_error(self) -> None:
        if self._thread_error is not None:
            raise RuntimeError(f"while a checkpoint was written: {self._thread_error}") from self._thread_error
