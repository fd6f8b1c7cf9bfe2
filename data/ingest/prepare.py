"""Text to shards: many processes, restartable at any moment, the same bytes every time.

The input is cut into tasks (data/text/sources.py); a task becomes at most one training shard and one validation shard, then a
small record in `output/tasks/` that says it is done. Every file appears whole or not at all and its bytes depend on the
input alone, so a run that was killed anywhere is simply started again: it skips the tasks that have records. The manifests
are written last. A document goes to validation when a hash of its text says so, so copies of it are never on both sides.
"""

import hashlib
import json
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import wait as wait_for_sentinel
from typing import Any

import numpy as np

from data import storage
from data.corpus.shards import CorpusManifest, ShardDraft, ShardInfo, token_dtype, write_corpus_manifest, write_shard
from data.ingest.deduplicate import keep_masks, text_key
from data.text.formats import InputPart, RejectedDocuments, TextFormat, read_documents
from data.text.sources import plan_tasks
from data.tokenizer.segmentation import encode_sampled
from data.tokenizer.tokenizer import Tokenizer

PLAN, RECORDS, KEYS = "plan.json", "tasks", "keys"
PARTS = ("train", "validation")


@dataclass(frozen=True)
class PrepareOptions:
    """How text becomes shards."""

    validation_fraction: float = 0.005
    """Share of the documents held out, chosen by a hash of their text; 0 = no validation part."""
    text_format: TextFormat = field(default_factory=TextFormat)
    deduplicate: bool = False
    """Keep only the first of documents with equal text."""
    sampling_alpha: float = 0.0
    """Above 0: draw each document's segmentation with exact probabilities exp(alpha * score) (Su 2023,
    kexue.fm/archives/9811); 0 = the best segmentation."""
    seed: int = 0

    def check(self, tokenizer: Tokenizer) -> None:
        """Raises ValueError for what no shards can be made with."""
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction = {self.validation_fraction}: give a share of at least 0 and below 1")
        if self.sampling_alpha < 0:
            raise ValueError(
                f"sampling_alpha = {self.sampling_alpha}: give a positive number, or 0 for the one best segmentation"
            )
        if self.sampling_alpha and not tokenizer.has_scores:
            raise ValueError(
                "sampling_alpha needs a unigram tokenizer, whose pieces have probabilities: train with --model unigram"
            )


@dataclass(frozen=True)
class Preparation:
    """What a worker must know: options, and where things are."""

    tokenizer: str
    """Directory."""
    tokenizer_fingerprint: str
    output: str
    options: PrepareOptions

    def record(self) -> dict[str, Any]:
        """What decides the bytes of the shards apart from the input, for plan.json."""
        options = asdict(self.options)
        text_format = options.pop("text_format")
        known = {"tokenizer": "", "tokenizer_fingerprint": self.tokenizer_fingerprint, "output": ""}
        return {**known, "reading": text_format, **options}


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


def prepare(
    inputs: list[str],
    tokenizer_directory: str,
    output: str,
    options: PrepareOptions | None = None,
    workers: int = 1,
    task_bytes: int | None = None,
    progress: Callable[[PrepareProgress], Any] | None = None,
) -> dict[str, CorpusManifest]:
    """Tokenize text into `output/train` and `output/validation`; returns their manifests.

    Args:
        inputs: files, folders, patterns or object-store addresses of text, JSON lines or Parquet.
        workers: processes; 1 = this one.
        task_bytes: input per shard; default see `plan_tasks`.
        progress: called when a task ends.

    Raises:
        ValueError, FileNotFoundError: bad input or options, or an output that holds another preparation.
    """
    if workers < 1:
        raise ValueError(f"workers = {workers}: give at least 1 process")
    tokenizer, options = Tokenizer.load(tokenizer_directory), options or PrepareOptions()
    options.check(tokenizer)
    preparation = Preparation(tokenizer_directory, tokenizer.fingerprint, output, options)
    tasks = plan_tasks(inputs, options.text_format, task_bytes)
    _write_plan(preparation, tasks)
    storage.remove_drafts(output)
    try:
        records = _run_all(preparation, tasks, workers, progress)
    except BrokenProcessPool as reason:
        raise ValueError(
            "a worker process was killed, most likely because memory ran out: run again with fewer --workers"
        ) from reason
    return _write_manifests(preparation, tokenizer, records)


def _run_all(
    preparation: Preparation, tasks: list[list[InputPart]], workers: int, progress: Callable[[PrepareProgress], Any] | None
) -> list[dict[str, Any]]:  # fmt: skip
    """Records of all tasks; on Ctrl-C the workers end at once, since what is half done is done again."""
    options, others = preparation.options, multiprocessing.active_children()
    with _executor(max(1, min(workers, len(tasks)))) as executor:
        try:
            if options.deduplicate:
                keep_masks(executor, tasks, options.text_format, storage.join_address(preparation.output, KEYS))
            return _run(executor, preparation, tasks, workers, progress)
        except KeyboardInterrupt:
            for worker in multiprocessing.active_children():
                if worker not in others:
                    worker.terminate()
            raise


def _write_plan(preparation: Preparation, tasks: list[list[InputPart]]) -> None:
    """Write the plan, or find the same plan there already. Another plan's output is never touched."""
    input_parts = [[asdict(input_part) for input_part in task] for task in tasks]
    plan = {
        "settings": preparation.record(),
        "tasks": len(tasks),
        "input": hashlib.sha256(json.dumps(input_parts).encode()).hexdigest(),
    }
    address = storage.join_address(preparation.output, PLAN)
    if not storage.exists(address):
        storage.write_atomic(address, json.dumps(plan, indent=1).encode())
    elif storage.read_json(address) != plan:
        raise ValueError(
            f"'{preparation.output}' holds a preparation of other input or settings (see {PLAN} there): choose another --output"
        )


def _executor(workers: int) -> Executor:
    if workers == 1:
        return _InProcess()
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent)
    # Ctrl-C reaches every process of a terminal: workers, which inherit this, leave it to the one that started them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        for _ in range(workers):  # each call starts one more, as long as none is idle
            executor.submit(int)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return executor


class _InProcess(Executor):
    """One worker: this process."""

    def submit(self, fn, /, *args, **kwargs) -> Future:
        future: Future = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as reason:
            future.set_exception(reason)
        return future


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait_for_sentinel([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run(
    executor: Executor,
    preparation: Preparation,
    tasks: list[list[InputPart]],
    workers: int,
    progress: Callable[[PrepareProgress], Any] | None,
) -> list[dict[str, Any]]:
    """Run the tasks that have no record yet, a few ahead of the workers; returns all records in order."""
    records: dict[int, dict[str, Any]] = _done(preparation, len(tasks))
    sizes = [sum(input_part.bytes for input_part in task) for task in tasks]
    skipped, started = sum(sizes[index] for index in records), time.monotonic()
    waiting = (index for index in range(len(tasks)) if index not in records)
    running: dict[Future, int] = {}
    try:
        while True:
            while len(running) < 2 * workers and (index := next(waiting, None)) is not None:
                running[executor.submit(_task, preparation, index, tasks[index])] = index
            if not running:
                return [records[index] for index in range(len(tasks))]
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                index = running.pop(future)
                records[index] = future.result()
                if progress:
                    done = sum(sizes[i] for i in records) - skipped
                    tokens = sum(record["counts"]["tokens"] for record in records.values())
                    seconds = time.monotonic() - started
                    progress(PrepareProgress(len(records), len(tasks), done, sum(sizes) - skipped, tokens, seconds))
    except Exception:  # not after Ctrl-C: the pool, whose workers are then ended, fails at a future that is cancelled
        for future in running:
            future.cancel()
        raise


def _done(preparation: Preparation, tasks: int) -> dict[int, dict[str, Any]]:
    """Records of the tasks that an earlier run finished."""
    folder = storage.join_address(preparation.output, RECORDS)
    if not storage.exists(folder):
        return {}
    names = {path.rsplit("/", 1)[-1] for path, _ in storage.list_files(folder, empty_ok=True)}
    here = [index for index in range(tasks) if _record_name(index) in names]
    return {index: _read_record(storage.join_address(folder, _record_name(index)), index) for index in here}


def _read_record(address: str, index: int) -> dict[str, Any]:
    """What `_task` wrote. Raises ValueError for anything else."""
    record = storage.read_json(address)
    try:
        shards = {part: ShardInfo(**shard) for part, shard in record["shards"].items()}
        tables = (record["counts"], record["left_out"], {part: shard.tokens for part, shard in shards.items()})
        numbers = [number for table in tables for number in table.values()]
        sound = shards.keys() <= {*PARTS} and {shard.file for shard in shards.values()} <= {f"shard-{index:06d}.arrow"}
        sound &= all(type(number) is int and number >= 0 for number in numbers) and "tokens" in record["counts"]
    except (KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise ValueError(f"'{address}' is no record of this preparation: remove it, and its task is done again")
    return record


def _record_name(index: int) -> str:
    return f"task-{index:06d}.json"


def _task(preparation: Preparation, index: int, input_parts: list[InputPart]) -> dict[str, Any]:
    """Tokenize one task; write its shards, then its record."""
    tokenizer = Tokenizer.load(preparation.tokenizer)
    if tokenizer.fingerprint != preparation.tokenizer_fingerprint:
        raise ValueError(f"the tokenizer at '{preparation.tokenizer}' was changed while preparing: choose another --output")
    faults = RejectedDocuments(preparation.options.text_format.on_error)
    counts: Counter = Counter(tokens=0)
    drafts = {part: ShardDraft(token_dtype(tokenizer.vocab_size)) for part in PARTS}
    for text, hashed in _kept_documents(preparation, index, input_parts, faults, counts):
        part = "validation" if hashed / 2**64 < preparation.options.validation_fraction else "train"
        tokens = _encode(tokenizer, text, preparation.options, hashed)
        drafts[part].add(tokens, tokenizer.end_of_text)
        counts["documents"] += 1
        counts["bytes"] += len(text) if text.isascii() else len(text.encode())
        counts["tokens"] += len(tokens) + 1
    shards = {
        part: asdict(write_shard(storage.join_address(preparation.output, part, f"shard-{index:06d}.arrow"), draft))
        for part, draft in drafts.items()
        if draft.lengths
    }
    record = {"shards": shards, "counts": dict(counts), "left_out": dict(faults.counts)}
    storage.write_atomic(storage.join_address(preparation.output, RECORDS, _record_name(index)), json.dumps(record).encode())
    return record


def _kept_documents(
    preparation: Preparation, index: int, input_parts: list[InputPart], faults: RejectedDocuments, counts: Counter
) -> Iterator[tuple[str, int]]:
    """(text, 64-bit hash of it) of the documents that stay."""
    mask = None
    if preparation.options.deduplicate:
        mask = np.frombuffer(storage.read_bytes(storage.join_address(preparation.output, KEYS, f"keep-{index:06d}.bin")), bool)
    number = 0
    for input_part in input_parts:
        for text in read_documents(input_part, preparation.options.text_format, faults):
            number += 1
            if mask is not None and not mask[number - 1]:
                counts["duplicates"] += 1
                continue
            yield text, int.from_bytes(text_key(text)[:8], "little")


def _encode(tokenizer: Tokenizer, text: str, options: PrepareOptions, hashed: int) -> np.ndarray:
    """Token ids of a document, without the separator at its end."""
    if options.sampling_alpha:
        ids = encode_sampled(tokenizer, text, options.sampling_alpha, options.seed ^ hashed)
    else:
        ids = tokenizer.encode_array(text)
    return ids if tokenizer.begin_of_text is None else np.insert(ids, 0, tokenizer.begin_of_text)


def _write_manifests(
    preparation: Preparation, tokenizer: Tokenizer, records: list[dict[str, Any]]
) -> dict[str, CorpusManifest]:
    """Write the manifests: what each part holds and what was left out of the whole."""
    counts, left_out = Counter(), Counter()
    for record in records:
        counts.update(record["counts"])
        left_out.update(record["left_out"])
    if not counts["documents"]:
        raise ValueError(
            f"the input holds no document to prepare (left out: {dict(left_out) or 'nothing'}): check the input and --field"
        )
    manifests = {}
    for part in PARTS if preparation.options.validation_fraction else PARTS[:1]:
        shards = [ShardInfo(**record["shards"][part]) for record in records if part in record["shards"]]
        manifests[part] = CorpusManifest(
            tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.end_of_text, token_dtype(tokenizer.vocab_size).name, shards,
            {**counts, "left_out": dict(left_out), "part_tokens": sum(shard.tokens for shard in shards)},
        ).sealed()  # fmt: skip
        write_corpus_manifest(storage.join_address(preparation.output, part), manifests[part])
    return manifests
