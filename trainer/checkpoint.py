"""Checkpoints of a run: written beside the training, complete or invisible, any layout resumes any of them.

Every parameter and every optimizer state lies under its own name as one full tensor, in rectangles that the ranks
wrote as they held them. A rank writes its own file; rank 0 adds the manifest and renames the directory into place.
"""

import contextlib
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trainer.config import CheckpointConfig
from trainer.lease import Lease
from trainer.manifest import FILE, Meta, TensorFile, assemble, encode
from trainer.rectangles import Shard
from trainer.restore import directory_name, find, load, names, read_manifest, read_meta, read_tensor, steps, verify
from trainer.staging import Staging
from trainer.store import LOCK, Disk, Objects, join, open_store, write
from trainer.tensorfile import Piece, check_file, pieces_to_write, write_tensors

__all__ = ["Checkpoints", "Meta", "Shard", "find", "load", "names", "read_manifest", "read_meta", "read_tensor", "verify"]

_ATTEMPTS = 3
_LOOKS = 5
_PAUSE_SECONDS = 1.0
_SLOWEST_SAVE = timedelta(hours=4)


def _beside(ranks: list[int]) -> dist.ProcessGroup:
    group = dist.new_group(ranks, backend="gloo", timeout=_SLOWEST_SAVE)
    assert isinstance(group, dist.ProcessGroup)
    return group


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
        self._failures = 0
        self._last_failure = ""
        self.complete: tuple[int, float | None] | None = None
        """Step of the newest checkpoint that is known to be complete, and when it was taken (time.monotonic(); None = before
        this process began)."""
        self._local = Disk(str(directory))
        self._lock = -1
        self._lease: Lease | None = None
        refused = self._from_first(self._take() if rank == 0 else "")
        if refused:
            raise ValueError(refused)

    def _take(self) -> str:
        """Rank 0: lock the run's own directory and the object store, clear away what a crash left.

        Returns a reason to refuse, or nothing.
        """
        try:
            self._lock = self._local.lock()
            if isinstance(self._store, Objects):
                lease = Lease(self._store, Path(self._local.address) / LOCK, self._report)
                lease.take()
                self._lease = lease
            self._store.recover()
        except (ValueError, OSError) as error:
            self._unlock()
            return str(error)
        return ""

    def _unlock(self) -> None:
        if self._lease is not None:
            self._lease.give_back()
            self._lease = None
        if self._lock >= 0:
            self._local.unlock(self._lock)
            self._lock = -1

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
        found = pieces_to_write(shards)
        if self._config.asynchronous:
            self._staging.begin(found)
            self._thread = threading.Thread(target=self._copy_and_write, args=(found, meta), name="checkpoint", daemon=True)
            self._thread.start()
        else:
            self._write(found, meta)
            self._raise_if_hopeless()

    def wait_for_copy(self, steady: bool = True) -> bool:
        """Return when the save in flight needs the shards no more; whether that took waiting.

        Without `steady`, only those that are not steady may change from here on.
        """
        return self._staging.wait(steady)

    def wait(self) -> None:
        """Return when the save in flight is complete on all ranks; raises as `save`."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self._raise_if_hopeless()

    def close(self) -> None:
        """Finish the save in flight and give the directory back."""
        try:
            self.wait()
        finally:
            self._unlock()

    def newest(self) -> str | None:
        """The newest complete and intact checkpoint, or None. Reports what it passed over and why.

        Every byte is read and checked, each rank taking its share of the files.
        """
        self.wait()
        for step in reversed(self._from_first(steps(self._store) if self._rank == 0 else [])):
            path = join(self.address, directory_name(step))
            fault = ""
            try:
                verify(path, (self._rank, self._world_size))
            except (ValueError, OSError) as error:
                fault = str(error)
            faults = [text for text in self._gather_everywhere(fault) if text]
            if not faults:
                return path
            self._say(f"checkpoint {path} is passed over: {faults[0]}")
        return None

    def _raise_if_hopeless(self) -> None:
        if self._failures >= self._config.max_failures:
            raise OSError(
                f"{self._failures} checkpoints in a row could not be written to {self.address}: {self._last_failure}; "
                "the run ends (checkpoint.max_failures)"
            )

    def _say(self, sentence: str) -> None:
        if self._rank == 0:
            self._report(sentence)

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
            lost = self._from_first(self._prepare(staging) if self._rank == 0 else "")
            file_name = f"rank-{self._rank:05d}.safetensors"
            if lost:
                answer = lost
            elif isinstance(found, str):
                answer = found
            else:
                answer = self._attempt(lambda: write_tensors(self._store, f"{staging}/{file_name}", found))
            answers = self._gather_first(answer)
            fault = self._from_first(self._complete(name, staging, meta, answers) if self._rank == 0 else "")
        except RuntimeError as error:  # gloo: another rank is gone, and with it this run
            fault = f"a rank was lost while saving ({str(error).splitlines()[0]})"
        self._failures = self._failures + 1 if fault else 0
        self._last_failure = fault
        if fault:
            self._say(f"checkpoint of step {meta.step} failed ({self._failures} of {self._config.max_failures}): {fault}")
        else:
            self.complete = (meta.step, began)
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

    def _tidy(self, newest: int) -> None:
        """Prune older checkpoints, and set aside later ones: they belong to a future this run has left."""
        present = steps(self._store)
        for step in present:
            if step > newest:
                self._store.hide(directory_name(step), "superseded")
                self._report(f"checkpoint of step {step} set aside: this run went back to before it")
        every = self._config.keep_every_steps
        for step in [step for step in present if step <= newest][: -self._config.keep]:
            if not (every and step % every == 0):
                self._store.remove(directory_name(step))

    def _from_first(self, value: Any) -> Any:
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
