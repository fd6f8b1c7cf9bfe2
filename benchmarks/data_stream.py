"""The stream against a plain copy of memory, and its share of a training step.

    python -m benchmarks.data_stream [--output docs/results/data_stream.md]

A corpus of random tokens (64 shards) in the page cache. "Copy" is numpy copying as many int64 as the batches hold. The share
is the processor time of reading a batch over that of a forward and backward pass of the quickstart network on it (one
thread), and the time a loop waits for `batches` when the stream reads ahead.
"""

import argparse
import statistics
import tempfile
import time

import numpy as np
import torch

from benchmarks.data_record import write_table
from data.config import DataConfig
from data.corpus.shards import CorpusManifest, ShardDraft, write_corpus_manifest, write_shard
from data.corpus.stream import BatchShape, Stream
from model.config import ModelConfig
from model.decoder import Decoder
from model.initialization import initialise
from model.parallel.layers import serial_kit
from model.positions.config import PositionConfig

VOCABULARY, SHARDS, SHARD_TOKENS = 4096, 64, 1 << 20


def write_corpus(folder: str) -> None:
    """Random tokens in documents of 500."""
    draw, shards = np.random.default_rng(0), []
    for number in range(SHARDS):
        draft = ShardDraft(np.dtype(np.uint16))
        for document in draw.integers(2, VOCABULARY, (SHARD_TOKENS // 500, 499), dtype=np.uint16):
            draft.add(document, 1)
        shards.append(write_shard(f"{folder}/shard-{number:06d}.arrow", draft))
    write_corpus_manifest(folder, CorpusManifest("0" * 64, VOCABULARY, 1, "uint16", shards).sealed())


def open_stream(folder: str, S: int, G: int, ahead: int) -> Stream:
    """One rank's stream of the whole batch."""
    return Stream(DataConfig(train=folder, prefetch_steps=ahead), "train", BatchShape(S, G, G), 0, 1, 0)


def against_copy(folder: str, S: int, G: int) -> tuple[float, float]:
    """(tokens per second of the stream, tokens per second of a copy of inputs and targets)"""
    stream = open_stream(folder, S, G, 0)
    stream.batches(0)
    steps, speeds, copies = max(4, (1 << 21) // (S * G)), [], []
    source = np.ones((2, G, S), np.int64)
    for round_ in range(5):
        started = time.process_time()
        for step in range(steps):
            stream.batches(1 + round_ * steps + step)
        speeds.append(steps * S * G / (time.process_time() - started))
        started = time.process_time()
        for _ in range(steps):
            np.copyto(np.empty_like(source), source)
        copies.append(steps * S * G / (time.process_time() - started))
    stream.close()
    return statistics.median(speeds), statistics.median(copies)


def share_of_step(folder: str, S: int, G: int, steps: int = 6) -> tuple[float, float]:
    """(processor time of reading / of a step, time the loop waited / of a step)"""
    config = ModelConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4
    )
    network = Decoder(config, PositionConfig(), S, serial_kit())
    initialise(network, 0)
    plain, ahead = open_stream(folder, S, G, 0), open_stream(folder, S, G, 2)
    read = computed = waited = 0.0
    for step in range(steps):
        started = time.process_time()
        plain.batches(step)
        read += time.process_time() - started
        started = time.perf_counter()
        (batch,) = ahead.batches(step)
        waited += time.perf_counter() - started if step else 0.0
        started = time.process_time()
        total, count = network(batch.inputs_BS, batch.targets_BS)
        (total / count).backward()
        computed += time.process_time() - started
    plain.close()
    ahead.close()
    return read / computed, waited / computed


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(folder)
        for S, G in ((256, 32), (4096, 8)):
            speed, copy = against_copy(folder, S, G)
            rows.append(
                (f"S = {S:,}: stream / copy of memory", f"{speed / copy:.0%} ({speed / 1e6:,.0f} M tokens/s a process)")
            )
        read, waited = share_of_step(folder, 256, 16)
        rows.append(("quickstart step: reading / forward and backward", f"{read:.3%}"))
        rows.append(("quickstart step: waiting for the stream / forward and backward", f"{waited:.3%}"))
    note = "Tokens per second are of this machine; the ratios carry over."
    write_table(options.output, "The stream", "python -m benchmarks.data_stream", note, rows)


if __name__ == "__main__":
    main()
