"""Text to shards: many processes, restartable at any moment, the same bytes every time.

The input is cut into tasks (data/text/sources.py); a task becomes at most one training shard and one validation shard, then a
small record in `output/tasks/` that says it is done. Every file appears whole or not at all and its bytes depend on the
input alone, so a run that was killed anywhere is simply started again: it skips the tasks that have records. The manifests
are written last. A document goes to validation when a hash of its text says so, so copies of it are never on both sides.
"""

import hashlib
import json
import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any

from data import storage
from data.corpus.shards import CorpusManifest, ShardInfo, token_dtype, write_corpus_manifest
from data.ingest.deduplicate import keep_masks
from data.ingest.tasks import (
    KEYS,
    RECORDS,
    SPLITS,
    Preparation,
    PrepareOptions,
    check_task,
    read_record,
    record_name,
    run_task,
)
from data.ingest.workers import executor_of
from data.text.fields import listed
from data.text.formats import InputPart
from data.text.sources import InputFiles, check_fields, cut_tasks, find_files, refuse_inside
from data.tokenizer.tokenizer import Tokenizer

PLAN = "plan.json"
FOLDERS = (*SPLITS, RECORDS, KEYS)
PLANNED = ("address", "kind", "compression", "start", "stop", "bytes")
"""Fields of an InputPart that a plan covers; the field of the text is among its settings."""


@dataclass(frozen=True)
class PrepareProgress:
    """Handed to the caller whenever a task ends."""

    done_tasks: int
    tasks: int
    done_bytes: int  # of input
    bytes: int
    tokens: int
    seconds: float

    @property
    def remaining_seconds(self) -> float:
        """Time left at the speed so far."""
        return self.seconds * (self.bytes - self.done_bytes) / max(self.done_bytes, 1)


@dataclass(frozen=True)
class Prepared:
    """What a preparation left in its output."""

    manifests: dict[str, CorpusManifest]
    """By split."""
    tasks: int
    tasks_before: int
    """Of these, how many an earlier start had done."""


def prepare(
    inputs: list[str],
    tokenizer_directory: str,
    output: str,
    options: PrepareOptions | None = None,
    workers: int = 1,
    task_bytes: int | None = None,
    progress: Callable[[PrepareProgress | str], Any] | None = None,
) -> Prepared:
    """Tokenize text into `output/train` and `output/validation`.

    Args:
        inputs: files, folders, patterns or object-store addresses of text, JSON lines, Parquet or Arrow.
        workers: processes; 1 = this one.
        task_bytes: input per shard; default see `cut_tasks`.
        progress: called with a sentence about the input before the first task, and when a task ends.

    Raises:
        ValueError, FileNotFoundError: bad input or options, or an output that holds another preparation.
    """
    if workers < 1:
        raise ValueError(f"workers = {workers}: give at least 1 process")
    tokenizer, options = Tokenizer.load(tokenizer_directory), options or PrepareOptions()
    options.check(tokenizer)
    preparation = Preparation(tokenizer_directory, tokenizer.fingerprint, output, options)
    refuse_inside(output, inputs)
    found = find_files(inputs)
    check_fields(found, options.text_format)
    tasks = cut_tasks(found, options.text_format, task_bytes)
    with storage.only_writer(output, "--output"):
        _write_plan(preparation, tasks)
        for folder in ("", *FOLDERS):
            storage.remove_drafts(storage.join_address(output, folder) if folder else output)
        if progress and found.left_out:
            progress("\n".join(found.remarks()))
        records, done = _run_all(preparation, tasks, workers, progress)
        _refuse_changed(found, inputs, output)
        return Prepared(_write_manifests(preparation, tokenizer, records, found), len(tasks), done)


def _refuse_changed(found: InputFiles, inputs: list[str], output: str) -> None:
    """Raises ValueError for files that grew, shrank, came or went while they were read."""
    before, now = dict(found.files), dict(find_files(inputs).files)
    if changed := sorted(address for address in {*before, *now} if before.get(address) != now.get(address)):
        raise ValueError(
            f"'{changed[0]}' changed while it was read: let nothing write to the input, remove '{output}' and prepare it again"
        )


def _run_all(
    preparation: Preparation,
    tasks: list[list[InputPart]],
    workers: int,
    progress: Callable[[PrepareProgress | str], Any] | None,
) -> tuple[list[dict[str, Any]], int]:
    """Records of all tasks, and how many were done before; on Ctrl-C the workers end at once, since what is half done is done
    again."""
    options, others = preparation.options, multiprocessing.active_children()
    with executor_of(max(1, min(workers, len(tasks)))) as executor:
        try:
            done = _done(executor, preparation, tasks)
            if options.deduplicate:
                keep_masks(executor, tasks, options.text_format, storage.join_address(preparation.output, KEYS))
            return _run(executor, preparation, tasks, done, workers, progress), len(done)
        except BrokenProcessPool as reason:
            why = "a worker process was killed, most likely because memory ran out"
            raise ValueError(f"{why}: run again with fewer --workers") from reason
        except KeyboardInterrupt:
            for worker in multiprocessing.active_children():
                if worker not in others:
                    worker.terminate()
            raise


def _done(executor: Executor, preparation: Preparation, tasks: list[list[InputPart]]) -> dict[int, dict[str, Any]]:
    """Records of the tasks that an earlier start finished and whose shards are as it left them.

    Raises:
        ValueError: the input has changed since. Reading it takes a fifteenth of tokenizing.
    """
    folder = storage.join_address(preparation.output, RECORDS)
    files = storage.list_files(folder, empty_ok=True) if storage.exists(folder) else []
    names = {path.rsplit("/", 1)[-1] for path, _ in files}
    found = {index: read_record(preparation, index) for index in range(len(tasks)) if record_name(index) in names}
    checks = {index: executor.submit(check_task, preparation, tasks[index], record) for index, record in found.items()}
    with _cancelled_by_errors(checks.values()):
        return {index: record for index, record in found.items() if checks[index].result()}


@contextmanager
def _cancelled_by_errors(futures: Iterable[Future]) -> Iterator[None]:
    """Cancel what waits, after an error; not after Ctrl-C: a pool whose workers were ended fails at a cancelled future."""
    try:
        yield
    except Exception:
        for future in futures:
            future.cancel()
        raise


def _write_plan(preparation: Preparation, tasks: list[list[InputPart]]) -> None:
    """Write the plan, or find the same plan there already. What another plan has finished is never touched."""
    parts = [[dict(zip(PLANNED, astuple(part))) for part in task] for task in tasks]
    plan = {
        "settings": json.loads(json.dumps(preparation.record())),
        "tasks": len(tasks),
        "input": hashlib.sha256(json.dumps(parts).encode()).hexdigest(),
    }
    address, before = storage.join_address(preparation.output, PLAN), _plan_before(preparation.output)
    if before == plan:
        return
    finished_any = storage.exists(storage.join_address(preparation.output, RECORDS))
    if finished_any and not _left_nothing_out(before, plan):
        what = (
            "of other files, sizes of files or --task-bytes"
            if before.get("settings") == plan["settings"]
            else "with other settings or tokenizer"
        )
        raise ValueError(
            f"'{preparation.output}' holds a preparation {what} (see {PLAN} there): choose another --output, "
            f"or remove '{preparation.output}' to prepare all of it again"
        )
    if not finished_any:
        storage.remove(storage.join_address(preparation.output, KEYS))
    storage.write_atomic(address, json.dumps(plan, indent=1).encode())


def _plan_before(output: str) -> dict[str, Any]:
    """The plan of the preparation that an output holds; {} for a new output.

    Raises:
        ValueError: it holds something else in the places that a preparation writes to.
    """
    taken = [name for name in (PLAN, *FOLDERS) if storage.exists(storage.join_address(output, name))]
    before = storage.read_json(storage.join_address(output, PLAN)) if PLAN in taken else {}
    if taken and not (isinstance(before, dict) and before.keys() == {"settings", "tasks", "input"}):
        raise ValueError(f"'{output}' holds {listed(taken)}, but no preparation of ours: choose another --output")
    return before


def _left_nothing_out(before: dict[str, Any], plan: dict[str, Any]) -> bool:
    """Whether the plans differ in this alone: before, --on-error was stop, so that what is finished left out nothing."""
    reading = {**before["settings"].get("reading", {})}
    allowed = reading.pop("on_error", "") == "stop"
    return allowed and {**before, "settings": {**before["settings"], "reading": {**reading, "on_error": "skip"}}} == plan


def _run(
    executor: Executor,
    preparation: Preparation,
    tasks: list[list[InputPart]],
    done: dict[int, dict[str, Any]],
    workers: int,
    progress: Callable[[PrepareProgress | str], Any] | None,
) -> list[dict[str, Any]]:
    """Run the tasks that have no record yet, a few ahead of the workers; returns all records in order."""
    records = dict(done)
    sizes = [sum(input_part.bytes for input_part in task) for task in tasks]
    skipped, started = sum(sizes[index] for index in records), time.monotonic()
    waiting = (index for index in range(len(tasks)) if index not in records)
    running: dict[Future, int] = {}
    with _cancelled_by_errors(running):
        while True:
            while len(running) < 2 * workers and (index := next(waiting, None)) is not None:
                running[executor.submit(run_task, preparation, index, tasks[index])] = index
            if not running:
                return [records[index] for index in range(len(tasks))]
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                index = running.pop(future)
                records[index] = future.result()
                if progress:
                    read = sum(sizes[i] for i in records) - skipped
                    tokens = sum(record["counts"]["tokens"] for record in records.values())
                    seconds = time.monotonic() - started
                    progress(PrepareProgress(len(records), len(tasks), read, sum(sizes) - skipped, tokens, seconds))


def _write_manifests(
    preparation: Preparation, tokenizer: Tokenizer, records: Iterable[dict[str, Any]], found: InputFiles
) -> dict[str, CorpusManifest]:
    """Write the manifests: what each split holds and what was left out of the whole."""
    counts, left_out = Counter(), Counter()
    for record in records:
        counts.update(record["counts"])
        left_out.update(record["left_out"])
    if not counts["documents"]:
        storage.remove(storage.join_address(preparation.output, RECORDS))  # another --field may find some
        raise ValueError(
            f"the input holds no document to prepare (left out: {dict(left_out) or 'nothing'}): check the input and --field"
        )
    whole = {**counts, "left_out": dict(left_out), **({"files_left_out": found.left_out} if found.left_out else {})}
    manifests = {}
    for split in SPLITS if preparation.options.validation_fraction else SPLITS[:1]:
        shards = [ShardInfo(**record["shards"][split]) for record in records if split in record["shards"]]
        manifests[split] = CorpusManifest(
            tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.end_of_text, token_dtype(tokenizer.vocab_size).name, shards,
            {**whole, "part_tokens": sum(shard.tokens for shard in shards)},
        ).sealed()  # fmt: skip
        write_corpus_manifest(storage.join_address(preparation.output, split), manifests[split])
    return manifests
