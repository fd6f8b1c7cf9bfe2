"""Whole documents in rows: what it costs to pack the documents of a corpus, and how much of the rows stays empty.

    python -m benchmarks.data_packing [--documents 10000000] [--output docs/results/data_packing.md]

The lengths are drawn, no shards stand behind them: from a log-normal law (a median of 500 tokens, the thousandth part above
40,000), and evenly from 1 to the length of a row, of which there are most lengths at once.
"""

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np

from benchmarks.data_record import peak_memory, write_table
from data.corpus.packing import pack_corpus

Draw = Callable[[np.random.Generator, int, int], np.ndarray]


def log_normal(draw: np.random.Generator, documents: int, size: int) -> np.ndarray:
    """Lengths as those of text are."""
    return np.exp(draw.normal(6.2, 1.4, documents)).astype(np.int64) + 1


def even(draw: np.random.Generator, documents: int, size: int) -> np.ndarray:
    """Of all lengths up to that of a row as many."""
    return draw.integers(1, size, documents)


def measure(law: Draw, documents: int, size: int) -> tuple[float, int, int, float, float]:
    """Seconds, peak bytes, kept bytes, padding, and share of the documents that are cut, in a fresh process."""
    bounds = np.concatenate([[0], np.cumsum(law(np.random.default_rng(0), documents, size))])
    before, started = peak_memory(), time.process_time()
    packing = pack_corpus(bounds, size)
    seconds, peak = time.process_time() - started, peak_memory() - before
    kept = packing.starts.nbytes + packing.lengths.nbytes + packing.firsts.nbytes
    return seconds, peak, kept, 1 - int(bounds[-1]) / (packing.rows * size), packing.cut / documents


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=10_000_000)
    parser.add_argument("--output", default="")
    options = parser.parse_args()
    rows = []
    for law, name in ((log_normal, "log-normal"), (even, "even")):
        for size in (4096, 32_768, 131_072):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
                seconds, peak, kept, padding, cut = executor.submit(measure, law, options.documents, size).result()
            shares = f"padding {padding:.4%}, {cut:.2%} of the documents cut"
            rows.append(
                (f"{name}, rows of {size:,}", f"{seconds:.1f} s, {peak / 1e6:,.0f} MB, {kept / 1e6:,.0f} MB kept; {shares}")
            )
    note = (
        f"{options.documents:,} documents; processor time, and memory: the resident peak above the boundaries, and what "
        "is kept."
    )
    command = f"python -m benchmarks.data_packing --documents {options.documents}"
    write_table(options.output, "Whole documents in rows", command, note, rows)


if __name__ == "__main__":
    main()
