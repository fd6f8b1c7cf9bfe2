"""Who computes which matrix, and what is sent for it, as live engines do it."""

from copy import deepcopy
from typing import Any

import pytest
import torch

from benchmarks.collectives import BASE, MLA, Recorder
from benchmarks.plan_check import _Batch
from launch.config import RunConfig
from launch.engine import make_engine
from launch.load_config import build_config
from launch.planner.memory import layout_of, whole_update
from model.parallel.mesh import make_mesh
from model.sizes import parameter_counts
from tests.launch.planner.test_layouts import llama
from tests.ranks import run_ranks
from trainer.optimizers.whole import OwnedMatrix

ENGINES = {
    "ZeRO-1": (), "ZeRO-2": ("parallel.zero_stage=2",),
    "ZeRO-3": ("parallel.zero_stage=3", "parallel.zero_hpz_partition_size=1"),
    "fold": ("parallel.engine=fold", "optimizer.muon.nesterov=false", "optimizer.muon.others=tiger"),
}  # fmt: skip


CONTEXT = ("parallel.context_parallel_size=2",)


def made(tensor: int, data: int, *overrides: str) -> RunConfig:
    """A small network on tensor x data ranks, two of which share each sequence under CONTEXT; whose matrices take several
    rounds."""
    batch = (f"parallel.tensor_parallel_size={tensor}", f"train.global_batch_size={data}", "parallel.engine=zero")
    rest = ("optimizer.name=muon", "parallel.reduce_bucket_elements=60000", *overrides)
    return build_config(deepcopy(BASE), [*batch, *rest])


def _live(rank: int, ranks: int, tensor: int, more: tuple[str, ...]) -> dict[str, tuple[list[OwnedMatrix], list[int]]]:
    """By engine: the matrices as the ranks found them, and the bytes of each message of this rank in an update."""
    mesh = make_mesh(tensor, torch.device("cpu"), context_parallel_size=2 if CONTEXT[0] in more else 1)
    found = dict[str, Any]()
    for name, overrides in ENGINES.items():
        config = made(tensor, ranks // tensor, *overrides, *more)
        engine: Any = make_engine(config, mesh)
        engine.accumulate([_Batch(config, torch.Generator().manual_seed(rank))])
        with Recorder({}) as recorder:
            engine.update(1e-3)
        sizes = [call.bytes for call in recorder.calls if call.op == "send"]
        found[name] = (engine.optimizer._whole.matrices, sizes)
        engine.close()
    return found


@pytest.mark.parametrize(
    ("tensor", "data", "more"),
    [
        (1, 1, ()), (1, 2, ()), (1, 2, CONTEXT), (1, 3, ()), (2, 1, ()), (2, 2, ()),
        pytest.param(2, 3, (), marks=pytest.mark.slow), pytest.param(2, 4, CONTEXT, marks=pytest.mark.slow),
        *(
            pytest.param(*case, marks=pytest.mark.slow) for case in
            ((2, 2, MLA), (1, 2, ("optimizer.muon.precision=fp32",)), (1, 2, ("train.precision=fp32",)))
        ),
    ],
)  # fmt: skip
def test_live_engines_find_the_same_owners_and_send_the_same_bytes(tensor: int, data: int, more: tuple[str, ...]):
    """With the concatenation cut elsewhere by one element, ranks numbered the other way, or a part sent twice, they differ."""
    live = run_ranks(_live, tensor * data, tensor, more)
    for name, overrides in ENGINES.items():
        config = made(tensor, data, *overrides, *more)
        planned = whole_update(config, layout_of(config, tensor * data))
        assert planned is not None
        for rank, found in enumerate(live):
            matrices, sizes = found[name]
            assert tuple(matrices) == planned.matrices, name
            assert sum(sizes) == planned.to_owners.bytes_by_rank[rank] + planned.back.bytes_by_rank[rank], name
            assert len(sizes) == planned.to_owners.messages_by_rank[rank] + planned.back.messages_by_rank[rank], name
        assert planned.rounds > 1 or tensor * data == 1 or name in ("ZeRO-1", "ZeRO-2"), name  # these cut few matrices or none


def test_no_rule_needs_whole_matrices():
    config = llama()
    assert whole_update(config, layout_of(config, 8)) is None


def test_the_operations_of_a_llama_8b():
    """Five steps of 4 s^2 l + 2 s^3 per matrix, s its shorter side."""
    config = llama("optimizer.name=muon", "parallel.engine=zero", "train.micro_batch_size=1")
    update = whole_update(config, layout_of(config, 8))
    assert update is not None
    sides = [(4096, 4096)] * 2 + [(1024, 4096)] * 2 + [(4096, 14336)] * 3
    assert update.flops == sum(update.flops_by_rank) == 32 * sum(5 * (4 * s * s * long + 2 * s**3) for s, long in sides)
    assert (len(update.matrices), len(update.cut)) == (224, 6)
    counts = parameter_counts(config.model)
    assert sum(matrix.elements for matrix in update.matrices) == counts["attention"] + counts["mlp"]
