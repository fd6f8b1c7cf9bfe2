"""A corpus of ten trillion tokens: what it costs to open it and to find a sample.

    python -m benchmarks.data_scale [--shards 100000] [--output docs/results/data_scale.md]

The manifest is synthetic (no shards stand behind it): 100,000 shards of 100 million tokens.
"""

import argparse
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np

from benchmarks.data_record import peak_memory, write_table
from data.config import SourceConfig
from data.corpus.shards import CorpusManifest, ShardInfo, write_corpus_manifest
from data.corpus.stream import Samples

SHARD_TOKENS = 100_000_000


def write_synthetic(folder: str, shards: int) -> None:
    """Only the manifest."""
    infos = [
        ShardInfo(f"shard-{n:06d}.arrow", SHARD_TOKENS, 100_000, 2 * SHARD_TOKENS + 1_000_000, 800_256, f"{n:064x}")
        for n in range(shards)
    ]
    write_corpus_manifest(folder, CorpusManifest("0" * 64, 32_000, 1, "uint16", infos).sealed())


def measure(folder: str, sequence_length: int) -> dict[str, float]:
    """Seconds and bytes of opening, and seconds of places, in a fresh process."""
    before, started = peak_memory(), time.process_time()
    samples = Samples([(0, [SourceConfig(path=folder)])], sequence_length, 0)
    opened, memory = time.process_time() - started, peak_memory() - before
    far = {}
    for index in (0, 10**6, 10**12):
        times = []
        for offset in range(200):
            started = time.process_time()
            corpus, _, window = samples.place(np.array([index + offset]))
            source = samples.corpora[corpus[0]]
            np.searchsorted(source.ends, window[0] * sequence_length, side="right")
            times.append(time.process_time() - started)
        far[f"sample {index:,}"] = statistics.median(times)
    started = time.process_time()
    samples.place(np.arange(10**12, 10**12 + 4096))
    return {"open": opened, "memory": memory, "batch": time.process_time() - started, **far}


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--output", default="")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_synthetic(folder, options.shards)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
            found = executor.submit(measure, folder, 4096).result()
    rows = [
        ("open the corpus", f"{found['open']:.2f} s"),
        ("memory for it", f"{found['memory'] / 1e6:,.0f} MB"),
        *((f"find {name}", f"{1e6 * seconds:,.0f} us") for name, seconds in found.items() if name.startswith("sample")),
        ("find a batch of 4,096 samples from 10^12 on", f"{1e3 * found['batch']:,.1f} ms"),
    ]
    tokens = options.shards * SHARD_TOKENS
    size = f"{options.shards:,} shards, {tokens / 1e12:g} trillion tokens, S = 4,096"
    note = f"{size}; processor time; memory is the resident peak above that of the imports."
    command = f"python -m benchmarks.data_scale --shards {options.shards}"
    write_table(options.output, "Ten trillion tokens", command, note, rows)


if __name__ == "__main__":
    main()
