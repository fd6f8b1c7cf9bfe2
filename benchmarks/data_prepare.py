"""Preparing against bare sentencepiece encoding of the same documents, and the memory it takes.

    python -m benchmarks.data_prepare [--copies 1 8] [--rounds 3] [--task-bytes 0] [--output docs/results/data_prepare.md]

The text is Python's standard library as Parquet, `copies` times over (each copy of a document marked, so none are equal).
"Bare" reads nothing and writes nothing: it calls sentencepiece's encode on each document in memory. Both run in one process
on one thread and are compared by the processor time they use, so a busy machine changes the ratio little. Each round runs
in a process of its own; the ratio is of the medians.
"""

import argparse
import shutil
import statistics
import sysconfig
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import sentencepiece

from benchmarks.data_record import peak_memory, write_table
from data.ingest.prepare import prepare
from data.tokenizer.train import train_tokenizer


def standard_library() -> list[str]:
    """The source files of Python's standard library that are UTF-8."""
    texts = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" not in path.parts:
            try:
                texts.append(path.read_text(encoding="utf-8"))
            except UnicodeDecodeError:
                continue
    return [text for text in texts if text]


def write_corpus(folder: Path, copies: int) -> tuple[str, int]:
    """(pattern of the Parquet files, bytes of text)"""
    texts, size = standard_library(), 0
    folder.mkdir()
    for copy in range(copies):
        marked = [f"# copy {copy}\n{text}" for text in texts]
        size += sum(len(text.encode()) for text in marked)
        pq.write_table(pa.table({"text": marked}), folder / f"{copy:04d}.parquet", row_group_size=128)
    return str(folder / "*.parquet"), size


def bare(pattern: str, model: str) -> float:
    """Processor seconds of encoding alone."""
    files = sorted(Path(pattern).parent.glob("*.parquet"))
    texts = [text for file in files for text in pq.read_table(file)["text"].to_pylist()]
    pieces = sentencepiece.SentencePieceProcessor(model_file=model)
    started = time.process_time()
    for text in texts:
        pieces.encode(text)
    return time.process_time() - started


def whole(pattern: str, tokenizer: str, output: str, task_bytes: int) -> tuple[float, int]:
    """Processor seconds of prepare with one worker, and the most memory it took (bytes)."""
    shutil.rmtree(output, ignore_errors=True)
    started = time.process_time()
    prepare([pattern], tokenizer, output, task_bytes=task_bytes or None)
    return time.process_time() - started, peak_memory()


def alone(function, *arguments):
    """Run in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        return executor.submit(function, *arguments).result()


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--copies", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--task-bytes", type=int, default=0, help="input of a shard; 0 = as `tiglon prepare` chooses")
    parser.add_argument("--output", default="")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for copies in options.copies:
            pattern, size = write_corpus(folder / str(copies), copies)
            if not (folder / "tokenizer").exists():
                train_tokenizer([pattern], str(folder / "tokenizer"), 4096)
            model = str(folder / "tokenizer" / "tokenizer.model")
            bares, wholes, peaks = [], [], []
            for _ in range(options.rounds):
                bares.append(alone(bare, pattern, model))
                seconds, peak = alone(whole, pattern, str(folder / "tokenizer"), str(folder / "out"), options.task_bytes)
                wholes.append(seconds)
                peaks.append(peak)
            ratio = statistics.median(bares) / statistics.median(wholes)
            rows.append((f"{size / 1e6:,.0f} MB of text: throughput of prepare / of bare encoding", f"{ratio:.0%}"))
            rows.append((f"{size / 1e6:,.0f} MB of text: peak memory of prepare", f"{max(peaks) / 1e6:,.0f} MB"))
    copies = " ".join(map(str, options.copies))
    command = f"python -m benchmarks.data_prepare --copies {copies} --rounds {options.rounds} --task-bytes {options.task_bytes}"
    note = "Unigram, 4,096 pieces. Prepare reads Parquet, hashes, encodes, writes shards and checksums; bare only encodes."
    write_table(options.output, "Preparing against bare sentencepiece", command, note, rows)


if __name__ == "__main__":
    main()
