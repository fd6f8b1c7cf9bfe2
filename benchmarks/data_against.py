"""Time to the first sample and memory, on the same tokens: tiglon, Megatron's GPTDataset, Hugging Face datasets.

    pip install datasets
    python -m benchmarks.data_against [--tokens 200000000] [--rounds 3] [--output docs/results/data_against.md]

Each opens a prepared corpus in its own format and reads sample 0 of a shuffled epoch of 2,048-token samples, in a fresh
process; imports are not counted, and seconds are of the processor, so that a busy machine does not count. Megatron builds
its document, sample and shuffle indices; `datasets` shuffles rows of 2,049 tokens that were cut and written beforehand (its
best case). The files are in the page cache for all three.
"""

import argparse
import importlib.util
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.data_record import peak_memory, write_table
from data.config import DataConfig
from data.corpus.shards import CorpusManifest, ShardDraft, ShardInfo, write_corpus_manifest, write_shard
from data.corpus.stream import BatchShape, Stream

S, SHARD_TOKENS, MEAN_DOCUMENT = 2048, 1 << 24, 600


def write_all(folder: Path, count: int) -> None:
    """The same random documents in three formats."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(2, 32_000, count, dtype=np.uint16)
    ends = np.append(np.unique(draw.integers(0, count - 1, count // MEAN_DOCUMENT)), count - 1)
    tokens[ends] = 1
    documents = np.split(tokens, ends[:-1] + 1)
    shards: list[ShardInfo] = []
    draft = ShardDraft(np.dtype(np.uint16))
    for number, document in enumerate(documents, start=1):
        draft.add(document[:-1], 1)
        if len(draft.tokens) > SHARD_TOKENS or number == len(documents):
            shards.append(write_shard(str(folder / "tiglon" / f"shard-{len(shards):06d}.arrow"), draft))
            draft = ShardDraft(np.dtype(np.uint16))
    write_corpus_manifest(str(folder / "tiglon"), CorpusManifest("0" * 64, 32_000, 1, "uint16", shards).sealed())
    write_megatron(folder, documents)
    rows = pa.FixedSizeListArray.from_arrays(pa.array(tokens[: count // (S + 1) * (S + 1)]), S + 1)
    with pa.OSFile(str(folder / "rows.arrow"), "wb") as file, pa.ipc.new_stream(file, pa.schema({"tokens": rows.type})) as out:
        for start in range(0, len(rows), 1000):
            out.write_batch(pa.record_batch([rows.slice(start, 1000)], names=["tokens"]))


def write_megatron(folder: Path, documents: list[np.ndarray]) -> None:
    """Megatron's pair of files, by Megatron's own index writer."""
    from megatron.core.datasets.indexed_dataset import _IndexWriter

    (folder / "megatron").mkdir()
    np.concatenate(documents).tofile(folder / "megatron" / "x.bin")
    lengths = [len(document) for document in documents]
    with _IndexWriter(str(folder / "megatron" / "x.idx"), np.uint16) as writer:
        writer.write(lengths, None, list(range(len(documents) + 1)))


def tiglon(folder: str) -> tuple[float, int]:
    """(processor seconds to the first sample, memory in bytes)"""
    before, started = peak_memory(), time.process_time()
    stream = Stream(DataConfig(train=f"{folder}/tiglon", prefetch_steps=0), "train", BatchShape(S, 1, 1), 0, 1, 0)
    assert stream.batches(0)[0].inputs_BS.shape == (1, S)
    return time.process_time() - started, peak_memory() - before


def megatron(folder: str) -> tuple[float, int]:
    """The same through GPTDataset, one epoch."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    class Separator:
        vocab_size, eod, pad, unique_identifiers = 32_000, 1, 0, {"class": "Separator"}

    samples = Path(folder, "megatron/x.bin").stat().st_size // 2 // S - 1
    before, started = peak_memory(), time.process_time()
    config = GPTDatasetConfig(
        random_seed=0, sequence_length=S, blend=([f"{folder}/megatron/x"], None), split="1,0,0", tokenizer=Separator(),
        path_to_cache=tempfile.mkdtemp(dir=folder), reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False,
        create_attention_mask=False,
    )  # fmt: skip
    train, _, _ = BlendedMegatronDatasetBuilder(GPTDataset, [samples, 0, 0], lambda: True, config).build()
    assert len(train[0]["tokens"]) == S
    return time.process_time() - started, peak_memory() - before


def hugging_face(folder: str) -> tuple[float, int]:
    """The same through datasets' shuffle."""
    import datasets  # pyright: ignore[reportMissingImports]

    before, started = peak_memory(), time.process_time()
    rows = datasets.Dataset.from_file(f"{folder}/rows.arrow").shuffle(seed=0, keep_in_memory=True)
    assert len(rows[0]["tokens"]) == S + 1
    return time.process_time() - started, peak_memory() - before


def warmed(function, folder: str) -> tuple[float, int]:
    """Import what `function` needs, then measure it."""
    match function.__name__:
        case "megatron":
            import megatron.core.datasets.blended_megatron_dataset_builder
            import megatron.core.datasets.gpt_dataset  # noqa: F401
        case "hugging_face":
            import datasets  # noqa: F401  # pyright: ignore[reportMissingImports]
        case _:
            pass
    return function(folder)


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=200_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", default="")
    options = parser.parse_args()
    rivals = {"tiglon": tiglon, "Megatron GPTDataset": megatron}
    if importlib.util.find_spec("datasets"):
        rivals["Hugging Face datasets"] = hugging_face
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in rivals}
    with tempfile.TemporaryDirectory() as scratch:
        write_all(Path(scratch), options.tokens)
        for _ in range(options.rounds):
            for name, function in rivals.items():
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
                    found[name].append(executor.submit(warmed, function, scratch).result())
    base = statistics.median(seconds for seconds, _ in found["tiglon"])
    rows = []
    for name, pairs in found.items():
        seconds, memory = statistics.median(s for s, _ in pairs), statistics.median(m for _, m in pairs)
        measured = f"{1e3 * seconds:,.1f} ms ({seconds / base:,.1f} times), {memory / 1e6:,.1f} MB"
        rows.append((f"{name}: first sample, memory", measured))
    command = f"python -m benchmarks.data_against --tokens {options.tokens} --rounds {options.rounds}"
    size = f"{options.tokens:,} tokens, {options.tokens // MEAN_DOCUMENT:,} documents, samples of {S:,}"
    others = [
        f"{name} {version(name)}" for name in ("megatron-core", "datasets") if importlib.util.find_spec(name.split("-")[0])
    ]
    note = f"{size}; medians of processor time and of memory above the imports, fresh processes; {', '.join(others)}."
    write_table(options.output, "First sample, against others", command, note, rows)


if __name__ == "__main__":
    main()
