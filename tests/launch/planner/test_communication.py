"""What layouts of many ranks send is what the planner says; benchmarks/collectives.py does the same for all of them."""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.collectives import (
    BASE,
    INTERLEAVED,
    MLA,
    TENSOR_2,
    TRIALS,
    Call,
    Recorder,
    Trial,
    compare,
    count,
    passed_below,
    planned,
    roles,
    try_layout,
)
from benchmarks.plan_check import _Batch
from launch.engine import make_engine
from launch.load_config import build_config
from launch.planner.memory import layout_of
from model.parallel import tensor
from model.parallel.mesh import make_mesh
from tests.ranks import run_ranks

pytestmark = pytest.mark.slow


def trial(name: str) -> Trial:
    return next(each for each in TRIALS if each.name == name)


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        ("llama-8b.toml made small", 1024),
        ("ZeRO-1, 2 micro-batches", 1024),
        ("ZeRO-1, tensor 2, tokens split, 2 micro-batches", 8),
        ("ZeRO-1, tensor 2, largest logits", 8),
        ("ZeRO-2, tensor 8, embedding under AdamW", 1024),
        ("ZeRO-3, DeepSpeed's limits", 8),
        ("fold, tensor 8, tokens split, norms of outputs, selective recomputation", 64),
        ("fold, tensor 8, tokens split", 8),
        ("ZeRO-1, context 2", 1024),
        ("ZeRO-3, context 2, heads, largest logits", 8),
        ("fold, tensor 2, tokens split, context 2, latent attention, rows seen", 64),
        ("ZeRO-1, pipeline 2, tied, 4 micro-batches", 64),
        ("ZeRO-2, pipeline 2 interleaved, tensor 2, tokens split, last rank", 8),
        ("fold, pipeline 4, tied, 8 micro-batches", 64),
        ("fold, pipeline 4, tied, 8 micro-batches, third rank", 8),
        ("fold, context 2, heads, pipeline 2, tensor 2, full recomputation, last rank", 16),
    ],
)
def test_every_message_is_planned(name, ranks):
    _, rows = try_layout(trial(name), ranks)
    assert [row for row in rows if not row.exact] == []


def test_a_plan_of_half_the_bytes_is_seen():
    """So would a planner be that reckons with bf16 where fold sends float32."""
    fold = trial("fold")
    (found,) = run_ranks(count, 1, BASE, fold.options(8), 8, {}, grouped=False)
    plan = planned(build_config(BASE, fold.options(8)), 8, {})
    assert all(row.exact for row in compare(found.calls, plan))
    halved = [replace(part, bytes=part.bytes / 2) if part.what == "sum of the momentum" else part for part in plan]
    (wrong,) = [row for row in compare(found.calls, halved) if not row.exact]
    assert (wrong.what, wrong.counted, wrong.planned, wrong.error) == ("sum of the momentum", 6, 6, pytest.approx(-0.5))


def _count_with_one_more(rank: int, world_size: int, *rest: Any) -> Any:
    enter = tensor.MegatronKit.column_input

    def twice(self: Any, x: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(x.detach().clone(), group=self.group)
        return enter(self, x)

    tensor.MegatronKit.column_input = twice  # type: ignore[method-assign]
    return count(rank, world_size, *rest)


def test_a_layer_that_sends_once_more_is_seen():
    options = trial("ZeRO-1, tensor 2").options(8)
    (found,) = run_ranks(_count_with_one_more, 1, BASE, options, 8, {}, grouped=False)
    (wrong,) = [row for row in compare(found.calls, planned(build_config(BASE, options), 8, {})) if not row.exact]
    entered = 2 * 4 + 1  # two per block, one before the head
    assert (wrong.group, wrong.counted - wrong.planned) == ("tensor", entered)


def _live(rank: int, ranks: int, kinds: dict[str, list[str]]) -> dict[str, list[Call]]:
    """What this rank sends in an update of each configuration."""
    sent = {}
    for name, options in kinds.items():
        config = build_config(deepcopy(BASE), options)
        parallel = config.parallel
        mesh = make_mesh(
            parallel.tensor_parallel_size, torch.device("cpu"), context_parallel_size=parallel.context_parallel_size,
            pipeline_parallel_size=parallel.pipeline_parallel_size,
        )  # fmt: skip
        engine = make_engine(config, mesh)
        generator = torch.Generator().manual_seed(mesh.data.rank)
        with Recorder(roles(mesh, engine)) as recorder:
            engine.accumulate([_Batch(config, generator) for _ in range(layout_of(config, ranks).micro_batches)])
            engine.update(1e-3)
        engine.close()
        sent[name] = recorder.calls
    return sent


@pytest.mark.parametrize(
    ("ranks", "more"),
    [
        (2, ()), pytest.param(4, (), marks=pytest.mark.slow),
        pytest.param(4, (TENSOR_2, "parallel.sequence_parallel=true"), marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_ranks_that_share_sequences_send_what_is_planned(ranks: int, more: tuple[str, ...]):
    """On live ranks, with data ranks of 4: the keys or heads of every layer, and gradients over all that have the weights."""
    kinds = {
        f"{exchange}, {kind}, {recompute}": [
            "parallel.engine=fold", "parallel.context_parallel_size=2", f"parallel.context_exchange={exchange}",
            f"train.recompute={recompute}", f"train.global_batch_size={ranks}", *options, *more,
        ]
        for exchange in ("gather", "heads")
        for kind, options in (("gqa", ()), ("mla", MLA))
        for recompute in ("none", "selective")
    }  # fmt: skip
    for sent in run_ranks(_live, ranks, kinds):
        for name, calls in sent.items():
            rows = compare(calls, planned(build_config(deepcopy(BASE), kinds[name]), ranks, {}))
            assert [row for row in rows if not row.exact] == [], name
            assert ("all-to-all" in {row.op for row in rows}) == name.startswith("heads")


PIPELINES = {
    "Muon": ["optimizer.name=muon", "parallel.pipeline_parallel_size=2"],
    "Muon, interleaved": ["optimizer.name=muon", "parallel.pipeline_parallel_size=2", *INTERLEAVED, "parallel.zero_stage=2"],
    "fold": ["parallel.engine=fold", "parallel.pipeline_parallel_size=4", "model.tie_word_embeddings=true"],
}


def test_ranks_of_a_pipeline_send_what_is_planned():
    """On live ranks, each of them: streams and gradients, a tied embedding at the ends, and parts of whole matrices among the
    ranks of a stage, 2 data ranks, whose group is called after these."""
    kinds, seen = {name: [*options, "train.global_batch_size=8"] for name, options in PIPELINES.items()}, set[tuple[str, str]]()
    for rank, sent in enumerate(run_ranks(_live, 4, kinds)):
        for name, calls in sent.items():
            config = build_config(deepcopy(BASE), kinds[name])
            same = layout_of(config, 4).stage_ranks
            place, sender = divmod(rank, same)
            names = {"stage": "data"} if same > 1 else {"world": "pipeline"}  # a group has the name of its last axis
            plan = [replace(part, group=names.get(part.group, part.group)) for part in planned(config, 4, {}, place, sender)]
            calls = [call for call in calls if call.bytes > 4 or call.op != "send"]  # the first update asks for shapes
            rows = compare(calls, plan)
            assert [row for row in rows if not row.exact] == [], (name, rank)
            seen |= {(name, row.what) for row in rows}
    expected = {
        ("Muon", "parts of matrices to their owners"),
        ("Muon", "directions back"),
        ("fold", "gradient of the tied head"),
    }
    assert {(name, what.split(", ")[0]) for name, what in seen} >= expected


def _every_form(rank: int, world_size: int) -> tuple[list[tuple[str, int]], dict[str, int]]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    x, whole, world = torch.ones(4), torch.ones(32), dist.group.WORLD
    assert world is not None
    with profile(activities=[ProfilerActivity.CPU]) as below, Recorder({}) as recorder:
        dist.all_reduce(x, async_op=True).wait()  # type: ignore[union-attr]
        with dist._coalescing_manager():
            dist.all_reduce(x)
            dist.all_reduce(x)
        dist.reduce_scatter_tensor(x, whole)
        functional.all_reduce(x, "sum", world).sum()
        functional.all_gather_tensor(x, 0, world).sum()
        functional.reduce_scatter_tensor(whole, "sum", 0, world).sum()
    return [(call.op, call.bytes) for call in recorder.calls], dict(passed_below(below.events()))


def test_no_form_of_a_collective_escapes():
    ((calls, below),) = run_ranks(_every_form, 1, grouped=False)
    assert calls == [
        ("all-reduce", 16), ("all-reduce", 32), ("reduce-scatter", 128),
        ("all-reduce", 16), ("all-gather", 128), ("reduce-scatter", 128),
    ]  # fmt: skip
    assert below == {"all-reduce": 3, "reduce-scatter": 2, "all-gather": 1}
