"""What a layout of up to 1,024 ranks sends in a step, counted on one computer and held against the planner.

    python -m benchmarks.collectives [--output docs/results] [--only NAME]

Rank 0 of every layout, or a rank of a later stage of a pipeline, trains in a process of its own, through the engine a run would
have, on torch's `fake` process group: groups of any size, whose collectives do nothing. Every collective goes through torch's
dispatcher, where it is written down; torch's profiler counts the same operators from below, on every thread (up to 64 ranks),
and both must agree.
The third update is counted: in the first two DeepSpeed's stage 3 finds out in which order weights are used.
Writes collectives.md.
"""

import argparse
import os
import time
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from importlib import resources
from math import prod
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.plan_check import _Batch
from launch import program
from launch.config import RunConfig
from launch.engine import make_engine
from launch.load_config import build_config
from launch.planner.communication import SCALAR_SUMS, update_messages
from launch.planner.memory import layout_of
from launch.planner.time import Traffic
from model.parallel.mesh import Mesh, make_mesh
from model.sizes import parameter_counts
from tests.ranks import run_ranks
from trainer.config import STAGE_3
from trainer.engines import zero

BASE: dict[str, Any] = {
    "model": {
        "vocab_size": 4096, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 2, "tie_word_embeddings": False,
    },
    "train": {"sequence_length": 64, "micro_batch_size": 1, "precision": "bf16"},
    "parallel": {"reduce_bucket_elements": 200_000},
}  # fmt: skip
"""Grouped queries, a head of its own, and an embedding larger than a bucket."""
MLA = (
    "model.attention=mla", "model.q_lora_rank=48", "model.kv_lora_rank=32", "model.qk_nope_head_dim=16",
    "model.qk_rope_head_dim=8", "model.v_head_dim=16",
)  # fmt: skip
TIED = ("model.tie_word_embeddings=true", "model.tied_head=projection", "model.qk_norm=rms")

OPS = {
    "allreduce_": "all-reduce", "allreduce_coalesced_": "all-reduce", "all_reduce": "all-reduce", "all_reduce_": "all-reduce",
    "_allgather_base_": "all-gather", "allgather_": "all-gather", "allgather_into_tensor_coalesced_": "all-gather",
    "all_gather_into_tensor": "all-gather", "_reduce_scatter_base_": "reduce-scatter", "reduce_scatter_": "reduce-scatter",
    "reduce_scatter_tensor_coalesced_": "reduce-scatter", "reduce_scatter_tensor": "reduce-scatter", "broadcast_": "broadcast",
    "all_to_all_single": "all-to-all", "alltoall_base_": "all-to-all",
    "barrier": "barrier", "send": "send", "recv_": "receive", "recv_any_source_": "receive",
}  # fmt: skip
"""Torch's operators, c10d's and the functional ones; any other is an error until its bytes are known here."""


@dataclass(frozen=True)
class Call:
    """One collective of a rank, or one message to another rank, which the sender counts."""

    op: str
    group: str
    ranks: int
    bytes: int
    """Of the whole tensor: what each rank has of a sum or divides among all, all of what is gathered or scattered."""
    small: bool
    """A scalar, a list of norms (float64) or the rows seen (integers)."""
    sender: bool = True
    """Of a broadcast: it is this rank's tensor."""

    @property
    def sent(self) -> float:
        """Bytes this rank sends, in a ring where it is a collective."""
        if self.op in ("send", "receive", "broadcast"):
            return float(self.bytes) if self.op != "receive" and self.sender else 0.0
        passes = {"all-reduce": 2.0, "barrier": 0.0}.get(self.op, 1.0)
        return passes * self.bytes * (self.ranks - 1) / self.ranks


class Recorder(TorchDispatchMode):
    """Writes down every collective that is issued while it is entered, whoever issues it: these operators are below all of
    torch.distributed, its asynchronous, coalesced and functional forms included."""

    def __init__(self, roles: dict[str, str]):
        super().__init__()
        self.roles = roles
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        if func.namespace in ("c10d", "_c10d_functional") and name not in ("wait_tensor", "_wrap_tensor_autograd"):
            self.calls.append(self._call(name, args, functional=func.namespace != "c10d"))
        return func(*args, **(kwargs or {}))

    def _call(self, name: str, args: Any, functional: bool) -> Call:
        if name not in OPS:
            raise ValueError(f"the collective {name} is not among those that are understood: {', '.join(OPS)}")
        op, group = OPS[name], _group_of(args)
        output_first = op == "reduce-scatter" and not functional
        leaves = tree_leaves(args[1] if output_first else args[0])
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        times = group.size() if functional and op == "all-gather" else 1
        small = {x.dtype for x in tensors}.isdisjoint((torch.bfloat16, torch.float32)) or sum(x.numel() for x in tensors) <= 1
        small &= op not in ("send", "receive")  # parts of matrices travel as bytes
        whole = times * sum(x.numel() * x.element_size() for x in tensors)
        role = self.roles.get(group.group_name, f"of {group.size()}")
        return Call(op, role, group.size(), whole, small, op != "broadcast" or args[2] == group.rank())


def _group_of(args: Any) -> Any:
    for leaf in tree_leaves(args):
        if isinstance(leaf, torch.ScriptObject) and "ProcessGroup" in str(leaf._type()):
            return dist.ProcessGroup.unbox(leaf)
    names = [leaf for leaf in args if isinstance(leaf, str)]  # of the sum, then of the group
    return dist.distributed_c10d._resolve_process_group(names[-1])  # type: ignore[arg-type]


PROFILED = 64
"""Ranks up to which torch's profiler counts too."""


def passed_below(events: Any) -> Counter[str]:
    """Collectives in a profile, which sees the operators of every thread: how many there are of each operation. One that a
    dispatch mode hands on shows up again below the mode."""
    found: Counter[str] = Counter()
    for event in events or []:
        handed_on = event.cpu_parent is not None and event.cpu_parent.name == "PythonDispatchMode"
        if event.name.startswith("c10d::") and not handed_on:
            name = str(event.name).removeprefix("c10d::")
            found[OPS.get(name) or name] += 1
    return found


@dataclass(frozen=True)
class Counted:
    """What a rank of a layout made and sent."""

    groups: dict[str, int]
    """Its groups: how many there are of each size."""
    calls: list[Call]
    """Of one update."""


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """DeepSpeed set up as on a GPU, where it sends from contiguous buckets while the backward runs."""
    made = zero.deepspeed_config

    def settings(*args: Any) -> dict[str, Any]:
        found = made(*args)
        found["zero_optimization"] |= {"overlap_comm": True, "contiguous_gradients": True}
        return found

    with mock.patch.object(zero, "deepspeed_config", settings):
        yield


@contextmanager
def neighbours_agree() -> Iterator[None]:
    """Stages of a pipeline ask one another once whether shapes are known in advance; they are, and no answer arrives here."""
    yes = torch.ones(1, dtype=torch.int32)
    with mock.patch.object(PipelineStage, "_warmup_backward_result", lambda *arguments, **keywords: yes):
        yield


def roles(mesh: Mesh, engine: Any) -> dict[str, str]:
    """What groups are for, by name."""
    named = {"world": mesh.world.group} if mesh.tensor.size > 1 or mesh.pipeline.size > 1 else {}
    # axes that hold the same ranks share a group, which has the last name
    named |= {"stage": mesh.stage.group} if mesh.pipeline.size > 1 else {}
    named |= {"ends": mesh.ends.group, "pipeline": mesh.pipeline.group}
    named |= {"replicas": mesh.replicas.group, "data": mesh.data.group, "context": mesh.context.group}
    named |= {"tensor": mesh.tensor.group, "hpZ": getattr(engine, "hpz_group", None)}
    return {group.group_name: role for role, group in named.items() if group is not None}


def count(
    rank: int, _: int, values: dict[str, Any], overrides: list[str], ranks: int, stage_3: dict[str, int], place: int = 0
) -> Counted:  # fmt: skip
    """Train a rank of `ranks` for three updates, the first with its layers; what it sent in the last.

    Args:
        place: in the pipeline.
    """
    os.environ.update(WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE="8")
    config = build_config(values, overrides)
    parallel = config.parallel
    first = place * (ranks // parallel.pipeline_parallel_size)
    dist.init_process_group("fake", store=FakeStore(), rank=first, world_size=ranks)
    mesh = make_mesh(
        parallel.tensor_parallel_size, torch.device("cpu"), context_parallel_size=parallel.context_parallel_size,
        pipeline_parallel_size=parallel.pipeline_parallel_size,
    )  # fmt: skip
    with as_on_a_gpu(), mock.patch.dict(STAGE_3, stage_3):
        engine = make_engine(config, mesh)
    generator, recorder = torch.Generator().manual_seed(0), Recorder(roles(mesh, engine))

    def step() -> None:
        engine.accumulate([_Batch(config, generator) for _ in range(layout_of(config, ranks).micro_batches)])
        engine.update(1e-3)

    with ExitStack() as stack:
        stack.enter_context(neighbours_agree())
        step()
        step()
        # events of a thousand partitions of each weight would take minutes to sort; nothing else differs from 64 ranks
        below = stack.enter_context(profile(activities=[ProfilerActivity.CPU])) if ranks <= PROFILED else None
        stack.enter_context(recorder)
        step()
    seen, noted = passed_below(below.events()) if below else None, Counter(call.op for call in recorder.calls)
    if seen is not None and seen != noted:
        raise AssertionError(f"torch ran {dict(seen)}, of which {dict(noted)} were written down")
    sizes = Counter(f"of {group.size()}" for group in dist.distributed_c10d._world.pg_map)
    return Counted(dict(sizes), recorder.calls)


@dataclass(frozen=True)
class Row:
    """One kind of collective of a layout: an operation on a group, small ones apart."""

    op: str
    group: str
    ranks: int
    what: str
    counted: int
    planned: int
    bytes_counted: float
    """That a rank sends in an update."""
    bytes_planned: float

    @property
    def exact(self) -> bool:
        """Whether the plan has the number of messages and the bytes."""
        return self.counted == self.planned and abs(self.error) < 1e-9

    @property
    def error(self) -> float:
        """Of the planned bytes, relative to what was counted."""
        return self.bytes_planned / self.bytes_counted - 1 if self.bytes_counted else float(self.bytes_planned > 0)


def compare(calls: list[Call], planned: Sequence[Traffic]) -> list[Row]:
    """What was sent beside what was planned, by operation and group."""
    found: dict[tuple[str, str, int, bool], list[Any]] = {}
    for call in calls:
        if call.ranks > 1 and call.op != "receive":  # a group of one sends nothing; messages are counted where they are sent
            row = found.setdefault((call.op, call.group, call.ranks, call.small), [set(), 0, 0, 0.0, 0.0])
            row[1], row[3] = row[1] + 1, row[3] + call.sent
    for part in planned:
        row = found.setdefault((part.op, part.group, part.ranks, part.what == SCALAR_SUMS), [set(), 0, 0, 0.0, 0.0])
        row[0].add(part.what)
        row[2], row[4] = row[2] + part.messages, row[4] + part.bytes
    return [
        Row(op, group, ranks, ", ".join(sorted(whats)) or "not planned", *numbers)
        for (op, group, ranks, _), (whats, *numbers) in found.items()
    ]


def planned(
    config: RunConfig, ranks: int, stage_3: dict[str, int], place: int = 0, sender: int = 0
) -> Sequence[Traffic]:  # fmt: skip
    """What the planner says of a configuration, with this computer's chunks of the loss.

    Args:
        place: in the pipeline.
        sender: which of the ranks there.
    """
    hpz = config.parallel.zero_hpz_partition_size or 1
    layout = replace(layout_of(config, ranks), zero_hpz_partition_size=hpz)
    with mock.patch.dict(STAGE_3, stage_3):
        parts = update_messages(config, layout, "cpu", place, sender)
    return [Traffic(p.what, p.op, p.group, p.ranks, "", p.bytes_sent, p.messages, 0.0, p.hidden) for p in parts]


CONTEXT_2, CONTEXT_4, HEADS = (
    "parallel.context_parallel_size=2", "parallel.context_parallel_size=4", "parallel.context_exchange=heads",
)  # fmt: skip
TENSOR_2, TENSOR_8 = "parallel.tensor_parallel_size=2", "parallel.tensor_parallel_size=8"
SPLIT = "parallel.sequence_parallel=true"
PIPELINE_2, PIPELINE_4 = "parallel.pipeline_parallel_size=2", "parallel.pipeline_parallel_size=4"
INTERLEAVED = ("parallel.pipeline_schedule=interleaved", "parallel.pipeline_stages_per_rank=2")
TIE = "model.tie_word_embeddings=true"
STAGE_2, STAGE_3_ALONE = ("parallel.zero_stage=2",), ("parallel.zero_stage=3", "parallel.zero_hpz_partition_size=1")
LARGE = {
    "stage3_max_live_parameters": 600_000, "stage3_max_reuse_distance": 600_000, "stage3_prefetch_bucket_size": 30_000,
    "stage3_param_persistence_threshold": 1_000,
}  # fmt: skip
"""DeepSpeed's limits, as small beside this network as its defaults are beside one of a few billion parameters."""


MOE = (
    "model.feed_forward=moe", "model.n_routed_experts=16", "model.num_experts_per_tok=2", "model.moe_intermediate_size=64",
    "model.first_k_dense_replace=1",
)  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """A layout; data-parallel ranks follow from the ranks in all."""

    name: str
    overrides: tuple[str, ...] = ()
    micro_batches: int = 1
    stage_3: dict[str, int] | None = None
    ranks: tuple[int, ...] = (8, 64, 1024)
    values: dict[str, Any] | None = None
    place: int = 0
    """In the pipeline, of the rank that trains."""

    def options(self, ranks: int) -> list[str]:
        """Overrides with the batch that gives so many micro-batches."""
        shared = tuple(f"parallel.{axis}_parallel_size=" for axis in ("tensor", "context", "pipeline"))
        sizes = (int(option.split("=")[1]) for option in self.overrides if option.startswith(shared))
        batch = ranks // prod(sizes) * self.micro_batches
        return [*self.overrides, f"train.global_batch_size={batch}", "train.micro_batch_size=1"]


def shipped() -> dict[str, Any]:
    """llama-8b.toml under fold, with a small network on few tokens."""
    values = tomllib.loads((resources.files("launch") / "configs" / "llama-8b.toml").read_text())
    small = {"sequence_length": 64, "compile": False}  # compilation changes nothing that is sent, and takes a minute
    return values | {
        "model": values["model"] | BASE["model"], "train": values["train"] | small,
        "parallel": BASE["parallel"] | {"engine": "fold"},
    }  # fmt: skip


POST = ["model.norm_placement=post", "model.qk_norm=rms-all-heads", "model.attention_bias=all", "model.mlp_bias=true"]
FOLD = "parallel.engine=fold"
TRIALS = [
    Trial("llama-8b.toml made small", micro_batches=2, values=shipped()),
    Trial("ZeRO-1"),
    Trial("ZeRO-1, 2 micro-batches", micro_batches=2),
    Trial("ZeRO-1, 2 micro-batches, fp32, AdamW", ("train.precision=fp32", "optimizer.name=adamw"), 2),
    Trial("ZeRO-1, tensor 2", (TENSOR_2,)),
    Trial("ZeRO-1, tensor 2, largest logits", (TENSOR_2, "optimizer.qk_clip=100"), ranks=(8,)),
    Trial("ZeRO-1, tensor 2, tokens split, 2 micro-batches", (TENSOR_2, SPLIT), 2),
    Trial("ZeRO-1, tensor 8, tokens split", (TENSOR_8, SPLIT)),
    Trial("ZeRO-2, 2 micro-batches", STAGE_2, 2),
    Trial("ZeRO-2, tensor 8, embedding under AdamW", (*STAGE_2, TENSOR_8, "optimizer.rules.embedding.rule=adamw")),
    Trial("ZeRO-3, DeepSpeed's limits", STAGE_3_ALONE, ranks=(8, 64)),
    Trial("ZeRO-3, 2 micro-batches", STAGE_3_ALONE, 2, LARGE),
    Trial("ZeRO-3, full recomputation", (*STAGE_3_ALONE, "train.recompute=full"), 1, LARGE, (8, 64)),
    Trial(
        "ZeRO-3 + hpZ, 2 micro-batches", ("parallel.zero_stage=3", "parallel.zero_hpz_partition_size=8"), 2, LARGE, (64, 1024)
    ),
    Trial("ZeRO-3, tensor 8, tokens split", (*STAGE_3_ALONE, TENSOR_8, SPLIT), 1, LARGE, (64, 1024)),
    Trial("fold", (FOLD,)),
    Trial("fold, tensor 2, 2 micro-batches", (FOLD, TENSOR_2), 2),
    Trial("fold, tensor 8, rows seen", (FOLD, TENSOR_8, "optimizer.rules.embedding.rows=seen")),
    Trial("fold, tensor 8, tokens split", (FOLD, TENSOR_8, SPLIT)),
    Trial("fold, tensor 2, tokens split, selective recomputation", (FOLD, TENSOR_2, SPLIT, "train.recompute=selective")),
    Trial("fold, tensor 2, full recomputation", (FOLD, TENSOR_2, "train.recompute=full")),
    Trial("fold, tensor 2, tokens split, latent attention", (FOLD, TENSOR_2, SPLIT, *MLA), ranks=(8,)),
    Trial("fold, tensor 2, tokens split, tied by a projection, normed heads", (FOLD, TENSOR_2, SPLIT, *TIED), ranks=(8,)),
    Trial("fold, tensor 2, norms of outputs, full recomputation", (FOLD, TENSOR_2, *POST, "train.recompute=full"), ranks=(8,)),
    Trial("ZeRO-1, context 2", (CONTEXT_2,)),
    Trial("ZeRO-1, context 8 = all ranks, heads", ("parallel.context_parallel_size=8", HEADS), ranks=(8,)),
    Trial("ZeRO-3, context 2, heads, largest logits", (*STAGE_3_ALONE, CONTEXT_2, HEADS, "optimizer.qk_clip=100"), ranks=(8,)),
    Trial("fold, context 4, 2 micro-batches, selective recomputation", (FOLD, CONTEXT_4, "train.recompute=selective"), 2),
    Trial("fold, context 4, heads, 2 micro-batches, full recomputation", (FOLD, CONTEXT_4, HEADS, "train.recompute=full"), 2),
    Trial(
        "fold, tensor 2, tokens split, context 2, latent attention, rows seen",
        (FOLD, TENSOR_2, SPLIT, CONTEXT_2, *MLA, "optimizer.rules.embedding.rows=seen"),
        ranks=(8, 64),
    ),
    Trial("fold, tensor 2, context 2, heads, latent attention", (FOLD, TENSOR_2, CONTEXT_2, HEADS, *MLA), ranks=(8,)),
    Trial(
        "fold, tensor 8, tokens split, norms of outputs, selective recomputation",
        (FOLD, TENSOR_8, SPLIT, *POST, "train.recompute=selective"),
        ranks=(64,),
    ),
    Trial("ZeRO-1, experts, 2 micro-batches", MOE, 2, ranks=(8, 64)),
    Trial("ZeRO-2, experts, tensor 2, tokens split", (*STAGE_2, TENSOR_2, SPLIT, *MOE), ranks=(8,)),
    Trial("ZeRO-3, experts", (*STAGE_3_ALONE, *MOE), ranks=(8,)),
    Trial(
        "fold, experts, tensor 2, selective recomputation", (FOLD, TENSOR_2, *MOE, "train.recompute=selective"), ranks=(8, 64)
    ),
    Trial(
        "fold, experts, context 2, auxiliary loss", (FOLD, CONTEXT_2, *MOE, "model.router_aux_loss_coef=0.01"), 2, ranks=(8,)
    ),
    Trial("ZeRO-1, experts, pipeline 2", (PIPELINE_2, *MOE), 4, ranks=(8,)),
    Trial("ZeRO-1, pipeline 2, tied, 4 micro-batches", (PIPELINE_2, TIE, "optimizer.name=adamw"), 4, ranks=(8, 64)),
    Trial("ZeRO-1, pipeline 2, tied, 4 micro-batches, last rank", (PIPELINE_2, TIE), 4, ranks=(8,), place=1),
    Trial(
        "ZeRO-2, pipeline 2 interleaved, tensor 2, tokens split",
        (*STAGE_2, PIPELINE_2, *INTERLEAVED, TENSOR_2, SPLIT),
        4,
        ranks=(8, 64),
    ),
    Trial(
        "ZeRO-2, pipeline 2 interleaved, tensor 2, tokens split, last rank",
        (*STAGE_2, PIPELINE_2, *INTERLEAVED, TENSOR_2, SPLIT),
        4,
        ranks=(8,),
        place=1,
    ),
    Trial("fold, pipeline 4, tied, 8 micro-batches", (FOLD, PIPELINE_4, TIE), 8, ranks=(8, 64)),
    Trial("fold, pipeline 4, tied, 8 micro-batches, third rank", (FOLD, PIPELINE_4, TIE), 8, ranks=(8,), place=2),
    Trial("fold, pipeline 4, tied, 8 micro-batches, last rank", (FOLD, PIPELINE_4, TIE), 8, ranks=(8,), place=3),
    Trial("ZeRO-1, context 2, pipeline 2, 4 micro-batches", (CONTEXT_2, PIPELINE_2), 4, ranks=(8, 64)),
    Trial(
        "fold, context 2, heads, pipeline 2, tensor 2, full recomputation, last rank",
        (FOLD, CONTEXT_2, HEADS, PIPELINE_2, TENSOR_2, "train.recompute=full"),
        4,
        ranks=(16,),
        place=1,
    ),
]


def try_layout(trial: Trial, ranks: int) -> tuple[Counted, list[Row]]:
    """Count a layout, and hold the planner against it."""
    values, options, limits = trial.values or BASE, trial.options(ranks), trial.stage_3 or {}
    run: Any = (deepcopy(values), options, ranks, limits, trial.place)
    (found,) = run_ranks(count, 1, *run, grouped=False, timeout_seconds=600)
    return found, compare(found.calls, planned(build_config(deepcopy(values), options), ranks, limits, trial.place))


def section(trial: Trial, ranks: int, found: Counted, rows: list[Row]) -> str:
    """One layout as Markdown."""
    groups = ", ".join(f"{number} {size}" for size, number in sorted(found.groups.items()))
    lines = [
        f"### {trial.name}: {ranks:,} ranks", "", f"Groups of {'this rank' if trial.place else 'rank 0'}: {groups}.", "",
        "| collective | group | what | counted | planned | bytes sent, counted | planned | |",
        "|---|---|---|--:|--:|--:|--:|--:|",
    ]  # fmt: skip
    for row in rows:
        where = f"{row.group}, {row.ranks:,} ranks"
        error = "exact" if row.exact else "bytes exact" if abs(row.error) < 1e-9 else f"{row.error:+.2%}"
        lines.append(
            f"| {row.op} | {where} | {row.what} | {row.counted} | {row.planned} | {row.bytes_counted:,.0f} | "
            f"{row.bytes_planned:,.0f} | {error} |"
        )
    return "\n".join(lines) + "\n"


HEAD = """# What layouts send, counted

    python -m benchmarks.collectives

Rank 0 of each layout, or where its name says so the first rank with later layers of a pipeline, trains on one CPU, through the
engine a run would have, in process groups of 8, 64 and 1,024 ranks whose collectives do nothing (torch's `fake` backend), with
DeepSpeed set up as on a GPU. Every collective of the third update is written down where all of them pass, torch's dispatcher,
and torch's profiler (up to 64 ranks) saw as many. Beside it is what `tiglon plan` reckons for the same configuration
(launch/planner/communication.py). Bytes are those a rank sends in a ring: of a sum of V bytes over n ranks 2 V (n - 1) / n, of
a gather, scatter or exchange half of that. Groups of one rank send nothing and are left out; *replicas* are the ranks with the
same weights, data x context. DeepSpeed fills partitions up to a multiple of the ranks. How its prefetching cuts the gathers of
stage 3 into messages is reckoned roughly, what they hold exactly. *Norms, counts, losses* are sums of a few numbers, and which
rows were seen where the embedding is lazy. Sends and broadcasts are counted on the rank that sends; what a rank of a pipeline
receives here is not what another has sent, which changes no message.

The network is small ({parameters:,} parameters in 4 blocks, 8 query heads on 2 key heads, a head of its own, an embedding
larger than the buckets of 200,000 numbers), on 64 tokens per micro-batch; DeepSpeed's limits of stage 3 are made smaller with
it.

"""


def main() -> None:
    """Count every layout, print a line each and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="folder of collectives.md")
    parser.add_argument("--only", default="", help="layouts whose name contains this; nothing is written then")
    arguments = parser.parse_args()
    chosen = [trial for trial in TRIALS if arguments.only in trial.name]
    if not chosen:
        names = ", ".join(trial.name for trial in TRIALS)
        raise ValueError(f"--only {arguments.only}: no layout has this in its name; there are {names}")
    if not arguments.only and not arguments.output.is_dir():
        raise ValueError(f"--output {arguments.output} is no folder; make it first")
    sections, exact, worst = [], 0, 0.0
    for trial in chosen:
        for ranks in trial.ranks:
            began = time.monotonic()
            found, rows = try_layout(trial, ranks)
            sections.append(section(trial, ranks, found, rows))
            exact += all(row.exact for row in rows)
            worst = max([worst, *(abs(row.error) for row in rows)])
            off = ", ".join(f"{row.what}: {row.counted} and {row.error:+.2%}" for row in rows if not row.exact)
            took = time.monotonic() - began
            print(
                f"{trial.name}, {ranks:,} ranks: {len(found.calls)} collectives, {off or 'as planned'} ({took:.0f} s)",
                flush=True,
            )
    others = "; the others in bytes only" if worst < 1e-9 else f"; the bytes of the others are off by {worst:.2%} at most"
    counts = f"{exact} of {len(sections)} layouts are planned exactly, in the number of messages and in bytes"
    summary = f"**{counts}{others if exact < len(sections) else ''}.**\n\n"
    print(summary.replace("**", "").strip())
    if not arguments.only:
        head = HEAD.format(parameters=parameter_counts(build_config(deepcopy(BASE)).model)["total"]) + summary
        (arguments.output / "collectives.md").write_text(head + "\n".join(sections))


if __name__ == "__main__":
    program.run(main)
