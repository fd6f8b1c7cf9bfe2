"""The planner against the live engines: training state and peak memory of one rank, for several layouts on CPU.

    python -m benchmarks.plan_check [--json FILE] [--only NAME]

Every layout is a real engine on a real network in its own processes (gloo). State is the storage of every tensor alive
after the last backward and before the update; the peak is what torch's CPU allocator held at most during two steps.
"""

import argparse
import gc
import json
import tempfile
import warnings
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from launch.config import RunConfig
from launch.engine import build_engine
from launch.load_config import build_config
from launch.planner.memory import Memory, layout_of, memory_of_rank
from model.parallel.mesh import make_mesh
from tests.ranks import run_ranks

BASE: dict[str, Any] = {
    "model": {
        "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6, "num_attention_heads": 8,
        "num_key_value_heads": 4, "tie_word_embeddings": True,
    },
    "train": {"sequence_length": 256, "global_batch_size": 16, "micro_batch_size": 4, "precision": "bf16"},
    "parallel": {"reduce_bucket_elements": 1_000_000},
}  # fmt: skip
MLA = [
    "model.attention=mla", "model.q_lora_rank=192", "model.kv_lora_rank=128", "model.qk_nope_head_dim=64",
    "model.qk_rope_head_dim=32", "model.v_head_dim=64",
]  # fmt: skip
LONG = ["train.sequence_length=2048", "train.micro_batch_size=1", "train.global_batch_size=1"]
SHARED = ["parallel.engine=fold", "parallel.context_parallel_size=2", *LONG]
HEADS = "parallel.context_exchange=heads"
FOLD = "parallel.engine=fold"
ADAMW = "optimizer.name=adamw"
UNTIED = "model.tie_word_embeddings=false"
PIPELINE_2, PIPELINE_4 = "parallel.pipeline_parallel_size=2", "parallel.pipeline_parallel_size=4"
INTERLEAVED = ("parallel.pipeline_schedule=interleaved", "parallel.pipeline_stages_per_rank=2")
EIGHT = "train.global_batch_size=32"
MOE = [
    "model.feed_forward=moe", "model.n_routed_experts=16", "model.num_experts_per_tok=3", "model.moe_intermediate_size=352",
    "model.first_k_dense_replace=1",
]  # fmt: skip
SPLIT_2 = "parallel.expert_parallel_size=2"
LAYOUTS = {
    "ZeRO-1, 1 rank, AdamW": (1, ["optimizer.name=adamw"]),
    "ZeRO-1, 2 ranks, Tiger": (2, []),
    "ZeRO-1, 2 ranks, Tiger, 1 micro-batch": (2, ["train.global_batch_size=8"]),
    "ZeRO-1, 2 ranks, AdamW, fp32": (2, ["optimizer.name=adamw", "train.precision=fp32"]),
    "ZeRO-2, 2 ranks, AdamW": (2, ["optimizer.name=adamw", "parallel.zero_stage=2"]),
    "ZeRO-3, 2 ranks, AdamW": (2, ["optimizer.name=adamw", "parallel.zero_stage=3"]),
    "ZeRO-1, tensor 2, Lion": (2, ["optimizer.name=lion", "parallel.tensor_parallel_size=2"]),
    "fold, 1 rank, Tiger": (1, ["parallel.engine=fold"]),
    "fold, 2 ranks, Tiger": (2, ["parallel.engine=fold"]),
    "fold, 1 rank, latent attention": (1, ["parallel.engine=fold", *MLA]),
    "fold, 1 rank, full recomputation": (1, ["parallel.engine=fold", "train.recompute=full"]),
    "fold, 1 rank, selective recomputation": (1, ["parallel.engine=fold", "train.recompute=selective"]),
    "ZeRO-1, 1 rank, AdamW, compiled": (1, ["optimizer.name=adamw", "train.compile=true"]),
    "fold, 1 rank, compiled": (1, ["parallel.engine=fold", "train.compile=true"]),
    "fold, 1 rank, selective, compiled": (1, ["parallel.engine=fold", "train.recompute=selective", "train.compile=true"]),
    "fold, 1 rank, full, compiled": (1, ["parallel.engine=fold", "train.recompute=full", "train.compile=true"]),
    "fold, 1 rank, 2,048 tokens": (1, ["parallel.engine=fold", *LONG]),
    "fold, context 2": (2, SHARED),
    "fold, context 2, selective recomputation": (2, [*SHARED, "train.recompute=selective"]),
    "fold, context 2, full recomputation": (2, [*SHARED, "train.recompute=full"]),
    "fold, context 2, latent attention": (2, [*SHARED, *MLA]),
    "fold, context 2, latent attention, selective recomputation": (2, [*SHARED, *MLA, "train.recompute=selective"]),
    "fold, context 2, heads": (2, [*SHARED, HEADS]),
    "fold, context 2, heads, latent attention": (2, [*SHARED, *MLA, HEADS]),
    "ZeRO-1, context 2, AdamW": (2, ["parallel.context_parallel_size=2", "optimizer.name=adamw", *LONG]),
    "fold, context 2, compiled": (2, [*SHARED, "train.compile=true"]),
    "fold, context 2, heads, compiled": (2, [*SHARED, HEADS, "train.compile=true"]),
    "fold, context 2, latent attention, selective, compiled": (
        2,
        [*SHARED, *MLA, "train.recompute=selective", "train.compile=true"],
    ),
    "ZeRO-1, pipeline 2, AdamW": (2, [PIPELINE_2, ADAMW]),
    "ZeRO-1, pipeline 2, AdamW, untied": (2, [PIPELINE_2, ADAMW, UNTIED]),
    "ZeRO-1, pipeline 2, AdamW, fp32": (2, [PIPELINE_2, ADAMW, "train.precision=fp32"]),
    "ZeRO-1, pipeline 2, data 2, AdamW": (4, [PIPELINE_2, ADAMW, EIGHT]),
    "ZeRO-2, pipeline 2, data 2, AdamW": (4, [PIPELINE_2, ADAMW, EIGHT, "parallel.zero_stage=2"]),
    "ZeRO-1, pipeline 4, AdamW, 8 micro-batches": (4, [PIPELINE_4, ADAMW, EIGHT]),
    "ZeRO-1, pipeline 2 interleaved, AdamW": (2, [PIPELINE_2, *INTERLEAVED, ADAMW]),
    "fold, pipeline 2": (2, [FOLD, PIPELINE_2]),
    "fold, pipeline 2, data 2": (4, [FOLD, PIPELINE_2, EIGHT]),
    "fold, pipeline 2, selective recomputation": (2, [FOLD, PIPELINE_2, "train.recompute=selective"]),
    "fold, pipeline 2, full recomputation": (2, [FOLD, PIPELINE_2, "train.recompute=full"]),
    "fold, pipeline 2 interleaved, 8 micro-batches": (2, [FOLD, PIPELINE_2, *INTERLEAVED, EIGHT]),
    "fold, pipeline 4, 8 micro-batches, untied": (4, [FOLD, PIPELINE_4, EIGHT, UNTIED]),
    "fold, 1 rank, experts": (1, [FOLD, *MOE]),
    "fold, 1 rank, experts recomputed": (1, [FOLD, *MOE, "train.recompute=experts"]),
    "fold, 1 rank, experts, selective recomputation": (1, [FOLD, *MOE, "train.recompute=selective"]),
    "fold, 1 rank, experts, full recomputation": (1, [FOLD, *MOE, "train.recompute=full"]),
    "ZeRO-1, 2 ranks, experts, AdamW": (2, [*MOE, ADAMW]),
    "ZeRO-2, 2 ranks, experts, AdamW": (2, [*MOE, ADAMW, "parallel.zero_stage=2"]),
    "ZeRO-3, 2 ranks, experts, AdamW": (2, [*MOE, ADAMW, "parallel.zero_stage=3"]),
    "fold, 2 ranks, experts": (2, [FOLD, *MOE]),
    "ZeRO-1, tensor 2, experts, AdamW": (2, [*MOE, ADAMW, "parallel.tensor_parallel_size=2"]),
    "ZeRO-1, pipeline 2, experts, AdamW": (2, [*MOE, ADAMW, PIPELINE_2]),
    "fold, 1 rank, experts, compiled": (1, [FOLD, *MOE, "train.compile=true"]),
    "ZeRO-1, 2 ranks, experts split, AdamW": (2, [*MOE, SPLIT_2, ADAMW]),
    "ZeRO-1, 4 ranks, experts split by 2, AdamW": (4, [*MOE, SPLIT_2, ADAMW, EIGHT]),
    "ZeRO-2, 4 ranks, experts split by 2, AdamW": (4, [*MOE, SPLIT_2, ADAMW, EIGHT, "parallel.zero_stage=2"]),
    "fold, 4 ranks, experts split by 2": (4, [FOLD, *MOE, SPLIT_2, EIGHT]),
    "fold, 2 ranks, experts split, recomputed": (2, [FOLD, *MOE, SPLIT_2, "train.recompute=experts"]),
    "fold, 2 ranks, experts split, selective recomputation": (2, [FOLD, *MOE, SPLIT_2, "train.recompute=selective"]),
    "fold, 2 ranks, experts split, full recomputation": (2, [FOLD, *MOE, SPLIT_2, "train.recompute=full"]),
    "ZeRO-1, pipeline 2, data 2, experts split by 2, AdamW": (4, [*MOE, SPLIT_2, ADAMW, PIPELINE_2, EIGHT]),
}


class _Batch:
    def __init__(self, config: RunConfig, generator: torch.Generator):
        shape = (config.train.micro_batch_size, config.train.sequence_length)
        self.inputs_BS = torch.randint(config.model.vocab_size, shape, generator=generator)
        self.targets_BS = torch.randint(config.model.vocab_size, shape, generator=generator)
        self.cu_seqlens = None


def live_bytes() -> int:
    """Bytes of every tensor storage alive in this process."""
    gc.collect()
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for thing in gc.get_objects():
            if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type == "cpu":  # the compiler keeps fakes
                storage = thing.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
                if thing.grad is not None:
                    storage = thing.grad.untyped_storage()
                    found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def measure(rank: int, world_size: int, values: dict[str, Any], overrides: list[str]) -> tuple[int, int]:
    """(state bytes, peak bytes) of this rank over two updates."""
    torch.set_num_threads(1)
    config = build_config(values, overrides)
    before = live_bytes()
    with tempfile.TemporaryDirectory() as folder:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            state = _train(config, world_size) - before
        trace = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    held = sorted(((event["ts"], event["args"]) for event in events if event.get("name") == "[memory]"), key=itemgetter(0))
    first = held[0][1]
    base = first["Total Allocated"] - first["Bytes"]  # the counter continues from earlier profiles of this process
    return state, max(event["Total Allocated"] for _, event in held) - base


def _train(config: RunConfig, world_size: int) -> int:
    parallel = config.parallel
    mesh = make_mesh(
        parallel.tensor_parallel_size, torch.device("cpu"), context_parallel_size=parallel.context_parallel_size,
        pipeline_parallel_size=parallel.pipeline_parallel_size, expert_parallel_size=parallel.expert_parallel_size,
    )  # fmt: skip
    count = layout_of(config, world_size).micro_batches
    made = build_engine(config, mesh)
    generator = torch.Generator().manual_seed(mesh.data.rank)
    state = 0
    for _ in range(2):
        made.accumulate([_Batch(config, generator) for _ in range(count)])
        state = live_bytes()
        made.update(1e-3)
    made.close()
    return state


def check(only: str = "") -> list[dict[str, Any]]:
    """Predicted and measured bytes of every layout whose name contains `only`, in a pipeline of every place."""
    rows = []
    for name, (ranks, overrides) in LAYOUTS.items():
        if only not in name:
            continue
        config = build_config(json.loads(json.dumps(BASE)), overrides)
        layout = layout_of(config, ranks)
        answers = run_ranks(measure, ranks, json.loads(json.dumps(BASE)), overrides)
        places = layout.pipeline_parallel_size
        for place in range(places):
            alike = answers[place * layout.stage_ranks : (place + 1) * layout.stage_ranks]
            shown = name if places == 1 else f"{name}: rank {place} of {places}"
            rows.append(_row(shown, memory_of_rank(config, layout, place, "cpu"), alike))
    return rows


def merged(before: Sequence[dict[str, Any]], found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a file with those that were found again, in the order of the layouts; rows of layouts that are no more go."""
    rows = {row["layout"]: row for row in [*before, *found]}
    order = [*LAYOUTS]
    known = [name for name in rows if name.partition(": rank ")[0] in LAYOUTS]
    return [rows[name] for name in sorted(known, key=lambda name: order.index(name.partition(": rank ")[0]))]


def _row(name: str, held: Memory, answers: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """The plan beside the largest of what ranks with the same layers have measured; printed, too."""
    state, peak = (max(numbers) for numbers in zip(*answers, strict=True))
    row = {
        "layout": name, "state": state, "state_predicted": held.training_state, "peak": peak, "peak_predicted": held.peak,
        "state_error": held.training_state / state - 1, "peak_error": held.peak / peak - 1,
    }  # fmt: skip
    print(
        f"{name:58s} state {state / 1e6:8.2f} MB, predicted {held.training_state / 1e6:8.2f} ({row['state_error']:+.1%})   "
        f"peak {peak / 1e6:8.2f} MB, predicted {held.peak / 1e6:8.2f} ({row['peak_error']:+.1%})",
        flush=True,
    )
    return row


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--only", default="", help="layouts whose name contains this; other rows of the file stay")
    arguments = parser.parse_args()
    found = check(arguments.only)
    if arguments.json:
        before = json.loads(arguments.json.read_text()) if arguments.only and arguments.json.exists() else []
        arguments.json.write_text(json.dumps(merged(before, found), indent=1))
