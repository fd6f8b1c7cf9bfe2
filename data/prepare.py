"""Text to shards: many processes, restartable at any moment, the same bytes every time.

The input is cut into tasks (data/sources.py); a task becomes at most one training shard and one validation shard, then a
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
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import wait as wait_for_sentinel
from typing import Any

import numpy as np

from data import storage
from data.duplicates import keep_masks, text_key
from data.segmentation import encode_sampled
from data.shards import Draft, Manifest, ShardInfo, token_dtype, write_manifest, write_shard
from data.sources import Faults, Piece, Reading, plan_tasks, read_documents
from data.tokenizer import Tokenizer

PLAN, RECORDS, KEYS = "plan.json", "tasks", "keys"
PARTS = ("train", "validation")


@dataclass(frozen=True)
class Settings:
    """What decides the bytes of a preparation, apart from its input."""

    tokenizer: str  # directory
    tokenizer_fingerprint: str
    output: str
    reading: Reading
    validation_fraction: float
    deduplicate: bool
    sampling_alpha: float  # random segmentation with P ~ exp(alpha * score); 0 = the one best segmentation
    seed: int


@dataclass(frozen=True)
class Progress:
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
    workers: int = 1,
    validation_fraction: float = 0.005,
    reading: Reading | None = None,
    deduplicate: bool = False,
    sampling_alpha: float = 0.0,
    seed: int = 0,
    task_bytes: int | None = None,
    progress: Callable[[Progress], Any] | None = None,
) -> dict[str, Manifest]:
    """Tokenize text into `output/train` and `output/validation`; returns their manifests.

    Args:
        inputs: files, folders, patterns or object-store addresses of text, JSON lines or Parquet.
        workers: processes; 1 = this one.
        validation_fraction: share of the documents held out, chosen by a hash of their text; 0 = no validation part.
        deduplicate: keep only the first of documents with equal text.
        sampling_alpha: > 0 draws each document's segmentation with exact probabilities exp(alpha * score) (kexue 9811).
        task_bytes: input of one shard; default see `plan_tasks`.
        progress: called when a task ends.
    Raises ValueError or FileNotFoundError for bad input, settings, or an output that holds another preparation.
    """
    tokenizer = Tokenizer.load(tokenizer_directory)
    _check(validation_fraction, workers, sampling_alpha, tokenizer)
    settings = Settings(
        tokenizer_directory, tokenizer.fingerprint, output, reading or Reading(),
        validation_fraction, deduplicate, sampling_alpha, seed,
    )  # fmt: skip
    tasks = plan_tasks(inputs, settings.reading, task_bytes)
    _claim(settings, tasks)
    storage.remove_drafts(output)
    others = multiprocessing.active_children()
    try:
        with _executor(workers) as executor:
            try:
                if deduplicate:
                    keep_masks(executor, tasks, settings.reading, storage.join(output, KEYS))
                records = _run(executor, settings, tasks, workers, progress)
            except KeyboardInterrupt:  # what they have half done is done again: nobody waits for it
                for worker in multiprocessing.active_children():
                    if worker not in others:
                        worker.terminate()
                raise
    except BrokenProcessPool as reason:
        raise ValueError(
            "a worker process was killed, most likely for want of memory: run again with fewer --workers"
        ) from reason
    return _finish(settings, tokenizer, records)


def _check(validation_fraction: float, workers: int, sampling_alpha: float, tokenizer: Tokenizer) -> None:
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction = {validation_fraction}: give a share of at least 0 and below 1")
    if workers < 1:
        raise ValueError(f"workers = {workers}: give at least 1 process")
    if sampling_alpha < 0:
        raise ValueError(f"sampling_alpha = {sampling_alpha}: give a positive number, or 0 for the one best segmentation")
    if sampling_alpha and not tokenizer.has_scores:
        raise ValueError(
            "sampling_alpha needs a unigram tokenizer, whose pieces have probabilities: train with --model unigram"
        )


def _claim(settings: Settings, tasks: list[list[Piece]]) -> None:
    """Write the plan, or find the same plan there already. Another plan's output is never touched."""
    pieces = [[asdict(piece) for piece in task] for task in tasks]
    what = asdict(replace(settings, output="", tokenizer=""))
    plan = {"settings": what, "tasks": len(tasks), "input": hashlib.sha256(json.dumps(pieces).encode()).hexdigest()}
    address = storage.join(settings.output, PLAN)
    if not storage.exists(address):
        storage.write_whole(address, json.dumps(plan, indent=1).encode())
    elif json.loads(storage.read_bytes(address)) != plan:
        raise ValueError(
            f"'{settings.output}' holds a preparation of other input or settings (see {PLAN} there): choose another --output"
        )


def _executor(workers: int) -> Executor:
    if workers == 1:
        return _Here()
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent)
    if threading.current_thread() is not threading.main_thread():
        executor.submit(int)
        return executor
    # Ctrl-C reaches every process of a terminal: workers, which inherit this, leave it to the one that started them
    heard = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        executor.submit(int)  # starts them
    finally:
        signal.signal(signal.SIGINT, heard)
    return executor


class _Here(Executor):
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
    executor: Executor, settings: Settings, tasks: list[list[Piece]], workers: int, progress: Callable[[Progress], Any] | None
) -> list[dict[str, Any]]:
    """Run the tasks that have no record yet, a few ahead of the workers; returns all records in order."""
    records: dict[int, dict[str, Any]] = _done(settings, len(tasks))
    sizes = [sum(piece.bytes for piece in task) for task in tasks]
    skipped, started = sum(sizes[index] for index in records), time.monotonic()
    waiting = (index for index in range(len(tasks)) if index not in records)
    running: dict[Future, int] = {}
    try:
        while True:
            while len(running) < 2 * workers and (index := next(waiting, None)) is not None:
                running[executor.submit(_task, settings, index, tasks[index])] = index
            if not running:
                return [records[index] for index in range(len(tasks))]
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                index = running.pop(future)
                records[index] = future.result()
                if progress:
                    done = sum(sizes[i] for i in records) - skipped
                    tokens = sum(record["counts"]["tokens"] for record in records.values())
                    seconds = time.monotonic() - started
                    progress(Progress(len(records), len(tasks), done, sum(sizes) - skipped, tokens, seconds))
    finally:
        for future in running:
            future.cancel()


def _done(settings: Settings, tasks: int) -> dict[int, dict[str, Any]]:
    """Records of the tasks that an earlier run finished."""
    folder = storage.join(settings.output, RECORDS)
    if not storage.exists(folder):
        return {}
    names = {path.rsplit("/", 1)[-1] for path, _ in storage.list_files(folder, empty_ok=True)}
    here = [index for index in range(tasks) if _record_name(index) in names]
    return {index: json.loads(storage.read_bytes(storage.join(folder, _record_name(index)))) for index in here}


def _record_name(index: int) -> str:
    return f"task-{index:06d}.json"


def _task(settings: Settings, index: int, pieces: list[Piece]) -> dict[str, Any]:
    """Tokenize one task; write its shards, then its record."""
    tokenizer = Tokenizer.load(settings.tokenizer)
    if tokenizer.fingerprint != settings.tokenizer_fingerprint:
        raise ValueError(f"the tokenizer at '{settings.tokenizer}' was changed while preparing: choose another --output")
    faults = Faults(settings.reading.on_error)
    counts: Counter = Counter(tokens=0)
    drafts = {part: Draft(token_dtype(tokenizer.vocab_size)) for part in PARTS}
    for text, hashed in _kept_documents(settings, index, pieces, faults, counts):
        part = "validation" if hashed / 2**64 < settings.validation_fraction else "train"
        tokens = _encode(tokenizer, text, settings, hashed)
        drafts[part].add(tokens, tokenizer.end_of_text)
        counts["documents"] += 1
        counts["bytes"] += len(text) if text.isascii() else len(text.encode())
        counts["tokens"] += len(tokens) + 1
    shards = {
        part: asdict(write_shard(storage.join(settings.output, part, f"shard-{index:06d}.arrow"), draft))
        for part, draft in drafts.items()
        if draft.lengths
    }
    record = {"shards": shards, "counts": dict(counts), "left_out": dict(faults.counts)}
    storage.write_whole(storage.join(settings.output, RECORDS, _record_name(index)), json.dumps(record).encode())
    return record


def _kept_documents(
    settings: Settings, index: int, pieces: list[Piece], faults: Faults, counts: Counter
) -> Iterator[tuple[str, int]]:
    """(text, 64-bit hash of it) of the documents that stay."""
    mask = None
    if settings.deduplicate:
        mask = np.frombuffer(storage.read_bytes(storage.join(settings.output, KEYS, f"keep-{index:06d}.bin")), bool)
    number = 0
    for piece in pieces:
        for text in read_documents(piece, settings.reading, faults):
            number += 1
            if mask is not None and not mask[number - 1]:
                counts["duplicates"] += 1
                continue
            yield text, int.from_bytes(text_key(text)[:8], "little")


def _encode(tokenizer: Tokenizer, text: str, settings: Settings, hashed: int) -> np.ndarray:
    if settings.sampling_alpha:
        return encode_sampled(tokenizer, text, settings.sampling_alpha, settings.seed ^ hashed)
    return tokenizer.encode_array(text)


def _finish(settings: Settings, tokenizer: Tokenizer, records: list[dict[str, Any]]) -> dict[str, Manifest]:
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
    for part in PARTS if settings.validation_fraction else PARTS[:1]:
        shards = [ShardInfo(**record["shards"][part]) for record in records if part in record["shards"]]
        manifests[part] = Manifest(
            tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.end_of_text, token_dtype(tokenizer.vocab_size).name, shards,
            {**counts, "left_out": dict(left_out), "part_tokens": sum(shard.tokens for shard in shards)},
        ).sealed()  # fmt: skip
        write_manifest(storage.join(settings.output, part), manifests[part])
    return manifests
