"""One save: every rank writes a file, rank 0 adds the manifest, publishes the directory and prunes older ones."""

import contextlib
import time
from collections.abc import Callable

from trainer.checkpoint.collectives import ObjectCollectives
from trainer.checkpoint.directory import CheckpointDirectory, directory_name
from trainer.checkpoint.format import StagedTensor, check_file, write_tensors
from trainer.checkpoint.lock import RunLock
from trainer.checkpoint.manifest import FILE, CheckpointMeta, TensorFile, encode_manifest, merge_files
from trainer.config import CheckpointConfig
from trainer.lost_rank import lost_rank_message

ATTEMPTS = 3
VISIBILITY_ATTEMPTS = 5
RETRY_SECONDS = 1.0
"""Between two attempts."""


class CheckpointWriter:
    """Writes the checkpoints of a run. A failure is a sentence that all ranks agree on, never an exception on one of them.

    Args:
        lock: of the run; only rank 0 asks whether it still holds.
        report: Takes one sentence for the log.
    """

    def __init__(
        self,
        directory: CheckpointDirectory,
        config: CheckpointConfig,
        ranks: ObjectCollectives,
        lock: RunLock,
        report: Callable[[str], None],
    ) -> None:
        self.directory, self._config, self._ranks, self._lock, self._report = directory, config, ranks, lock, report

    def write(self, tensors: list[StagedTensor] | str, meta: CheckpointMeta) -> str:
        """Write a checkpoint of `meta.step`, by all ranks together; "" or why there is none, on every rank.

        Args:
            tensors: what this rank writes, or why it cannot.
        """
        first = self._ranks.rank == 0
        staging = self.directory.store.staging_name(directory_name(meta.step))
        try:
            refusal = self._ranks.broadcast(self._prepare(staging) if first else "")
            result = refusal or (tensors if isinstance(tensors, str) else self._write_file(staging, tensors))
            results = self._ranks.gather(result)
            return self._ranks.broadcast(self._complete(staging, meta, results) if first else "")
        except RuntimeError as error:  # gloo: another rank is gone, and with it this run
            return f"a rank was lost while saving ({lost_rank_message(error) or error})"

    def _write_file(self, staging: str, tensors: list[StagedTensor]) -> TensorFile | str:
        """This rank's file, tried a few times; a sentence when it fails for good."""
        rank = self._ranks.rank
        fault = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(RETRY_SECONDS)
            try:
                return write_tensors(self.directory.store, f"{staging}/{_file_name(rank)}", tensors)
            except OSError as error:
                fault = f"rank {rank}: {error.strerror or error}"
            except Exception as error:  # the other ranks wait for an answer, whatever happened here
                return f"rank {rank}: {type(error).__name__}: {error}"
        return fault

    def _prepare(self, staging: str) -> str:
        """Rank 0: remove what a crash left under the name to be written. Returns why nothing may be written, or ""."""
        refusal = self._lost_lock()
        if not refusal:
            self._remove(staging)
        return refusal

    def _lost_lock(self) -> str:
        """Rank 0: why this run may not write any more, or ""."""
        address = self.directory.store.address
        try:
            if self._lock.held():
                return ""
        except OSError as error:
            return f"{address} does not answer ({error})"
        return f"{address} was taken by another run while this one did not renew its lock; give one of them another"

    def _remove(self, staging: str) -> None:
        with contextlib.suppress(OSError):  # writing into it will say what is wrong
            self.directory.store.remove(staging)

    def _complete(self, staging: str, meta: CheckpointMeta, results: list[TensorFile | str]) -> str:
        """Rank 0: write the manifest, publish, prune. Returns what went wrong, or ""."""
        try:
            self._publish(staging, meta, results)
        except Exception as error:  # the other ranks wait for an answer, whatever happened here
            if not self._lost_lock():
                self._remove(staging)
            return str(error) or type(error).__name__
        try:
            self.directory.set_aside_after(meta.step)
            self.directory.prune(meta.step, self._config.keep, self._config.keep_every_steps)
        except OSError as error:
            self._report(f"old checkpoints could not be removed: {error}")
        return ""

    def _publish(self, staging: str, meta: CheckpointMeta, results: list[TensorFile | str]) -> None:
        faults = [result for result in results if isinstance(result, str)]
        if faults:
            raise OSError(faults[0])
        files = {_file_name(rank): result for rank, result in enumerate(results) if isinstance(result, TensorFile)}
        self._wait_until_visible(staging, files)
        if refusal := self._lost_lock():
            raise OSError(refusal)
        store, name = self.directory.store, directory_name(meta.step)
        if staging != name and self.directory.is_foreign(meta.step):
            store.set_aside(name)
        store.write(f"{staging}/{FILE}", encode_manifest(merge_files(meta, files)))
        store.publish(name)

    def _wait_until_visible(self, staging: str, files: dict[str, TensorFile]) -> None:
        """Rank 0 must find every rank's file where the manifest will say; a shared file system may show it a little late."""
        store = self.directory.store
        for name, file in files.items():
            for attempt in range(1, VISIBILITY_ATTEMPTS + 1):
                try:
                    check_file(store, f"{staging}/{name}", name, file)
                    break
                except ValueError as error:
                    if attempt == VISIBILITY_ATTEMPTS:
                        raise OSError(f"{error} as rank 0 sees it: all ranks must share {store.address}") from None
                    time.sleep(RETRY_SECONDS)


def _file_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"
