"""What layouts of many ranks send is what the planner says; benchmarks/collectives.py does the same for all of them."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.collectives import BASE, TRIALS, Recorder, Trial, compare, count, passed_below, planned, try_layout
from launch.config import build_config
from model.parallel import tensor
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
