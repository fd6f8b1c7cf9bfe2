"""Checkpoints of a run: written beside the training, complete or invisible, any layout resumes any of them.

Every parameter and every optimizer state lies under its own name as one full tensor, in rectangles that the ranks
wrote as they held them. A rank writes its own file; rank 0 adds the manifest and renames the directory into place.
"""

import contextlib
import math
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trainer.config import CheckpointConfig
from trainer.lease import Lease
from trainer.life import Life, life_in
from trainer.lost import lost_connection
from trainer.manifest import FILE, Meta, TensorFile, assemble, encode
from trainer.rectangles import Shard
from trainer.restore import directory_name, find, load, names, read_manifest, read_meta, read_tensor, steps, verify
from trainer.staging import Staging
from trainer.store import LOCK, Disk, Lock, Objects, join, open_store, write
from trainer.tensorfile import Piece, check_file, pieces_to_write, write_tensors

__all__ = [
    "Checkpoints",
    "Complete",
    "Meta",
    "Shard",
    "find",
    "load",
    "names",
    "read_manifest",
    "read_meta",
    "read_tensor",
    "verify",
]

_ATTEMPTS = 3
_LOOKS = 5
_PAUSE_SECONDS = 1.0
_SLOWEST_SAVE = timedelta(hours=4)
_BEAT_SECONDS = 0.2


def _beside(ranks: list[int]) -> dist.ProcessGroup:
    group = dist.new_group(ranks, backend="gloo", timeout=_SLOWEST_SAVE)
    assert isinstance(group, dist.ProcessGroup)
    return group


@dataclass(frozen=True)
class Complete:
    """A checkpoint that is known to be complete."""

    step: int
    path: str
    taken: float | None = None
    """When its state was that of the run (time.monotonic()); None = before this process began."""


class Checkpoints:
    """The checkpoints of one run, as one rank sees them. Every method is called by all ranks together.

    Args:
        directory: A path or an object-store address; overridden by `config.directory`.
        group: The ranks that save together, or None for one. A gloo group of its own is made beside it, so that the
            writer never meets the collectives of training.
        report: Takes one sentence for the log.

    Raises:
        ValueError: when the directory cannot be written, or belongs to a run that is still going.
    """

    def __init__(
        self,
        directory: str,
        config: CheckpointConfig,
        rank: int,
        world_size: int,
        group: dist.ProcessGroup | None,
        report: Callable[[str], None],
    ) -> None:
        self.address = config.directory or str(directory)
        self._config, self._rank, self._world_size, self._report = config, rank, world_size, report
        self._ranks = dist.get_process_group_ranks(group) if group is not None else [0]
        assert len(self._ranks) == world_size, "the group must hold every rank that saves"
        self._group = _beside(self._ranks) if world_size > 1 else None
        self._store = open_store(self.address)
        self._staging = Staging()
        self._thread: threading.Thread | None = None
        self._in_flight: int | None = None
        self._broken: Exception | None = None
        self._failures = 0
        self._is_last = False
        self.last_failure = ""
        """Why the last save failed; empty if it did not."""
        self.complete: Complete | None = None
        """The newest checkpoint of this run."""
        self.outdated = False
        """It is not what the run goes on from its step with: it is another run's, or batches are passed over since."""
        self.life = Life()
        """Every other's checkpoints are left alone: not resumed, gone back to or removed."""
        self.beat: Callable[[], None] = lambda: None
        """Called while a save or a check goes on."""
        self._local = Disk(str(directory))
        self._locks: list[Lock] = []
        self._lease: Lease | None = None
        self._begun = False
        self._lives: dict[int, Life | None] = {}
        refused = self.agree(self._take() if rank == 0 else "")
        if refused:
            raise ValueError(refused)

    def _take(self) -> str:
        """Rank 0: lock the run's own directory and the one of its checkpoints.

        Returns a reason to refuse, or nothing.
        """
        try:
            self._locks.append(self._local.lock("run.dir"))
            if isinstance(self._store, Disk) and not self._store.same_as(self._local):
                self._locks.append(self._store.lock("checkpoint.directory"))
            if isinstance(self._store, Objects):
                lease = Lease(self._store, Path(self._local.address) / LOCK, self._report)
                lease.take()
                self._lease = lease
        except (ValueError, OSError) as error:
            self._unlock()
            return str(error)
        return ""

    def _unlock(self) -> None:
        if self._lease is not None:
            self._lease.give_back()
            self._lease = None
        while self._locks:
            self._locks.pop().give_back(undo=not self._begun)

    def begin(self) -> None:
        """The run begins: what a crash left half-written is cleared away. Until then nothing in the directory has changed."""
        self._begun = True
        if self._rank == 0:
            self._store.recover()

    def reserve(self, shards: list[Shard]) -> None:
        """Take the host memory of asynchronous saves of these shards, beside what follows, so that the first need not wait."""
        if self._config.asynchronous and self._config.every_steps:
            self._staging.reserve(pieces_to_write(shards))

    def save(self, shards: list[Shard], meta: Meta) -> None:
        """Write a checkpoint of `meta.step`.

        An asynchronous save returns at once; the shards must stay as they are until `wait_for_copy` has returned. A save
        that fails is reported and the run goes on.

        Raises:
            OSError: when `config.max_failures` saves in a row have failed.
        """
        self.wait()
        if not self._begun:
            self.begin()
        found = pieces_to_write(shards)
        self._in_flight = meta.step
        behind = self._config.asynchronous
        if behind:
            self._staging.begin(found)
        action = self._copy_and_write if behind else self._write
        self._thread = threading.Thread(target=self._guarded, args=(action, found, meta), name="checkpoint", daemon=True)
        self._thread.start()
        if not behind:
            self.wait()

    def secure(self, shards: list[Shard], meta: Meta) -> Complete:
        """Return when there is a complete checkpoint of `meta.step`: where the run ends there is no next save.

        Raises:
            OSError: when it cannot be had, however often it is tried.
        """
        for attempt in range(_ATTEMPTS):
            self.settle()
            self._raise_broken()
            if self.is_complete(meta.step):
                break
            if attempt:
                self._say(f"checkpoint of step {meta.step}: trying again")
                time.sleep(_PAUSE_SECONDS)
            self._failures, self._is_last = 0, True  # here they end nothing
            self.save(shards, meta)
        self.settle()
        if self.complete is not None and self.is_complete(meta.step):
            return self.complete
        raise OSError(f"step {meta.step} is not saved: {self.last_failure}; {self.kept()}")

    def has(self, step: int) -> bool:
        """Whether a checkpoint of this step is complete or being written."""
        return step == self._in_flight or self.is_complete(step)

    def is_complete(self, step: int) -> bool:
        """Whether there is a complete checkpoint of this step, as it is now."""
        return not self.outdated and self.complete is not None and self.complete.step == step

    def kept(self) -> str:
        """What there is to resume from."""
        if self.complete is None:
            return f"there is no complete checkpoint of this run in {self.address}"
        return f"the newest complete checkpoint is {self.complete.path}"

    def wait_for_copy(self, steady: bool = True) -> bool:
        """Return when the save in flight needs the shards no more; whether that took waiting.

        Without `steady`, only those that are not steady may change from here on.
        """
        waited = self._staging.wait(steady, self.beat)
        self._raise_broken()
        return waited

    def wait(self) -> None:
        """Return when the save in flight is complete on all ranks; raises as `save`."""
        self.settle()
        self._raise_broken()
        if self._failures >= self._config.max_failures:
            raise OSError(
                f"{self._failures} checkpoints in a row could not be written to {self.address}: {self.last_failure}; "
                f"the run ends (checkpoint.max_failures); {self.kept()}"
            )

    def settle(self, seconds: float = math.inf) -> None:
        """Return when no save is in flight any more, or after some time; whatever became of it."""
        end = time.monotonic() + seconds
        thread = self._thread
        while thread is not None and thread.is_alive() and time.monotonic() < end:
            thread.join(_BEAT_SECONDS)
            self.beat()
        self._thread = self._in_flight = None

    def close(self) -> None:
        """Finish the save in flight and give the directory back."""
        try:
            self.settle()
        finally:
            self._unlock()

    def newest(self, planned: int = 0) -> str | None:
        """The newest intact checkpoint of this life, or None where it has none. Reports what it passed over and why.

        With `planned`, the newest of a step that this number divides comes before those that a stop has left: a run that was
        never stopped has no others. Every byte is read and checked, each rank taking its share of the files.

        Raises:
            ValueError: there are some, and none is intact.
        """
        self.settle()
        passed_over = ""
        found = self.agree(list(self._candidates()) if self._rank == 0 else [])
        first = next((candidate for candidate in found if planned and candidate[0] % planned == 0), None)
        for step, fault in sorted(found, key=lambda candidate: candidate != first):
            path = join(self.address, directory_name(step))
            fault = fault or self.fault_of(path)
            if not fault:
                return path
            self._say(f"checkpoint {path} is passed over: {fault}")
            passed_over = passed_over or fault
        if passed_over:
            source = self.life.source
            anew = f"remove them to begin again from {source}" if source else "start anew with checkpoint.resume=never"
            raise ValueError(f"no checkpoint in {self.address} is intact ({passed_over}); restore one, or {anew}")
        return None

    def fault_of(self, path: str) -> str:
        """What is wrong with a checkpoint, or nothing; each rank reads its share of the files, and all hear the answer."""
        fault = ""
        try:
            verify(path, (self._rank, self._world_size), self.beat)
        except (ValueError, OSError) as error:
            fault = str(error)
        return next((text for text in self._gather_everywhere(fault) if text), "")

    def lives(self) -> Iterator[tuple[int, Life | None]]:
        """The checkpoints in the directory, newest first, each with its life; None for one that cannot be read."""
        for step in reversed(steps(self._store)):
            yield step, self._life_of(step)

    def _candidates(self) -> Iterator[tuple[int, str]]:
        """Steps of this life's checkpoints, newest first, and of those that cannot say whose they are, with the reason."""
        for step, life in self.lives():
            if life is None:
                yield step, _fault_of_manifest(join(self.address, directory_name(step)))
            elif life.id == self.life.id:
                yield step, ""

    def _life_of(self, step: int) -> Life | None:
        """Of a checkpoint in the directory; None if it cannot be read."""
        if step not in self._lives:
            try:
                meta = read_meta(join(self.address, directory_name(step)))
                self._lives[step] = life_in(meta.extra.get("life", {}))
            except (ValueError, OSError):
                return None
        return self._lives[step]

    def _say(self, sentence: str) -> None:
        if self._rank == 0:
            self._report(sentence)

    def _guarded(self, action: Callable[[list[Piece], Meta], None], found: list[Piece], meta: Meta) -> None:
        """Where a rank alone can fail on, the save is lost; where others wait for it, their collectives and its next ones would
        be taken for each other, so the run has to end."""
        try:
            action(found, meta)
        except Exception as error:
            traceback.print_exc()  # to the rank's log
            self._staging.give_up()
            self._failures += 1
            self.last_failure = f"rank {self._rank}: {type(error).__name__}: {error}"
            if self._world_size > 1:
                self._broken = error
            else:
                self._say_failed(meta.step)

    def _say_failed(self, step: int) -> None:
        count = "" if self._is_last else f" ({self._failures} of {self._config.max_failures})"
        self._say(f"checkpoint of step {step} failed{count}: {self.last_failure}")

    def _raise_broken(self) -> None:
        if self._broken is not None:
            raise RuntimeError(f"while a checkpoint was written: {self._broken}") from self._broken

    def _copy_and_write(self, found: list[Piece], meta: Meta) -> None:
        """All of an asynchronous save. Runs beside training, so it speaks to other ranks only over its own group."""
        try:
            copies = self._staging.copy(found)
        except (RuntimeError, OSError, MemoryError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            copies = f"rank {self._rank}: the state could not be copied to host memory ({reason})"
        self._write(copies, meta)

    def _write(self, found: list[Piece] | str, meta: Meta) -> None:
        """Write what was found; or join the other ranks with the reason why there is nothing."""
        began = time.monotonic()
        name = directory_name(meta.step)
        staging = self._store.staging(name)
        try:
            lost = self.agree(self._prepare(staging) if self._rank == 0 else "")
            file_name = f"rank-{self._rank:05d}.safetensors"
            if lost:
                answer = lost
            elif isinstance(found, str):
                answer = found
            else:
                answer = self._attempt(lambda: write_tensors(self._store, f"{staging}/{file_name}", found))
            answers = self._gather_first(answer)
            fault = self.agree(self._complete(name, staging, meta, answers) if self._rank == 0 else "")
        except RuntimeError as error:  # gloo: another rank is gone, and with it this run
            fault = f"a rank was lost while saving ({lost_connection(error) or error})"
        self._failures = self._failures + 1 if fault else 0
        self.last_failure = fault
        if fault:
            self._say_failed(meta.step)
        else:
            self.complete, self.outdated = Complete(meta.step, join(self.address, name), began), False
            self._lives[meta.step] = self.life
            self._say(f"checkpoint of step {meta.step} complete after {time.monotonic() - began:.2f} s")

    def _prepare(self, staging: str) -> str:
        """Rank 0: make room for a save. Returns why it must not be, or nothing."""
        lost = self._lost()
        if not lost:
            self._clear(staging)
        return lost

    def _lost(self) -> str:
        """Rank 0: why this run may not write any more, or nothing."""
        try:
            if self._lease is None or self._lease.held():
                return ""
        except OSError as error:
            return f"{self.address} does not answer ({error})"
        return f"{self.address} was taken by another run while this one showed no sign of life; give one of them another"

    def _clear(self, staging: str) -> None:
        """Remove what a crash left under the name we are about to write."""
        with contextlib.suppress(OSError):  # writing into it will say what is wrong
            self._store.remove(staging)

    def _attempt(self, action: Callable[[], TensorFile]) -> TensorFile | str:
        """The result of `action`, tried a few times; a sentence when it fails for good."""
        for attempt in range(_ATTEMPTS):
            try:
                return action()
            except OSError as error:
                fault = f"rank {self._rank}: {error.strerror or error}"
                if attempt + 1 < _ATTEMPTS:
                    time.sleep(_PAUSE_SECONDS)
            except Exception as error:  # the other ranks wait for an answer, whatever happened here
                return f"rank {self._rank}: {type(error).__name__}: {error}"
        return fault

    def _complete(self, name: str, staging: str, meta: Meta, answers: list[TensorFile | str]) -> str:
        """Rank 0: manifest, rename, prune. Returns what went wrong, or nothing."""
        faults = [answer for answer in answers if isinstance(answer, str)]
        files = {f"rank-{rank:05d}.safetensors": a for rank, a in enumerate(answers) if isinstance(a, TensorFile)}
        try:
            if faults:
                raise OSError(faults[0])
            self._see(staging, files)
            if lost := self._lost():
                raise OSError(lost)
            if staging != name and meta.step in steps(self._store) and self._life_of(meta.step) != self.life:
                self._store.hide(name)
            write(self._store, f"{staging}/{FILE}", encode(assemble(meta, files)))
            self._store.publish(name)
        except Exception as error:  # the other ranks wait for an answer, whatever happened here
            if not self._lost():
                self._clear(staging)
            return str(error) or type(error).__name__
        try:
            self._tidy(meta.step)
        except OSError as error:
            self._report(f"old checkpoints could not be removed: {error}")
        return ""

    def _see(self, staging: str, files: dict[str, TensorFile]) -> None:
        """Rank 0: every rank's file must be where the manifest will say; shared directories may show it a little late."""
        for name, file in files.items():
            for attempt in range(_LOOKS):
                try:
                    check_file(self._store, f"{staging}/{name}", name, file)
                    break
                except ValueError as error:
                    if attempt + 1 == _LOOKS:
                        raise OSError(f"{error} as rank 0 sees it: all ranks must share {self.address}") from None
                    time.sleep(_PAUSE_SECONDS)

    def go_back(self, step: int) -> None:
        """The run goes on from a checkpoint of this step: a start after a kill must find none of a later one."""
        self.outdated = True  # what it says of the batches to come is over
        if self._rank == 0:
            with contextlib.suppress(OSError):  # the next save tries again
                self._leave_future(step)

    def _leave_future(self, newest: int) -> None:
        """Set aside checkpoints of later steps: they belong to a future that this run has left, or to another run."""
        for step in steps(self._store):
            if step > newest:
                why = "this run went back to before it" if self._life_of(step) == self.life else "it is of another run"
                self._store.hide(directory_name(step))
                self._lives.pop(step, None)
                self._report(f"checkpoint of step {step} set aside: {why}")

    def _tidy(self, newest: int) -> None:
        """Prune older checkpoints of this life, and set aside later ones."""
        self._leave_future(newest)
        present, every = steps(self._store), self._config.keep_every_steps
        own = [step for step in present if step == newest or self._life_of(step) == self.life]
        for step in own[: -self._config.keep]:
            if not (every and step % every == 0):
                self._store.remove(directory_name(step))
                self._lives.pop(step, None)

    def agree(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self._group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=self._ranks[0], group=self._group, device=torch.device("cpu"))
        return box[0]

    def _gather_first(self, value: Any) -> list[Any]:
        """Every rank's value, on rank 0; an empty list elsewhere."""
        if self._group is None:
            return [value]
        answers: list[Any] = [None] * self._world_size if self._rank == 0 else []
        dist.gather_object(value, answers if self._rank == 0 else None, dst=self._ranks[0], group=self._group)
        return answers

    def _gather_everywhere(self, value: Any) -> list[Any]:
        if self._group is None:
            return [value]
        answers: list[Any] = [None] * self._world_size
        dist.all_gather_object(answers, value, group=self._group)
        return answers


def _fault_of_manifest(path: str) -> str:
    try:
        read_meta(path)
    except (ValueError, OSError) as error:
        return str(error)
    return ""
