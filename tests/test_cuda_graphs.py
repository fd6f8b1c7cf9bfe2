"""What `train.cuda_graphs` must hold to on any device; that replays train alike, tests/test_gpu.py asks a GPU."""

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.contestants import CONTESTANTS
from launch.engine import make_engine
from launch.load_config import build_config
from launch.network import build_network
from model import loss
from model.decoder import Decoder
from model.diagnostics import attention_statistics
from model.generate import generate
from model.parallel.mesh import Mesh, make_mesh
from tests.ranks import run_ranks
from tests.trainer.tiny import Batch
from trainer.config import ParallelConfig, TrainConfig
from trainer.engines.zero import deepspeed_config
from trainer.evaluate import evaluate, evaluate_context

LAYERS, LENGTH, STEPS = 2, 12, 4
ENGINES = [("fold", 1, 1), ("fold", 1, 2), ("zero", 1, 1), ("zero", 1, 2), ("zero", 2, 1), ("zero", 2, 2)]
"""Engine, stage, micro-batches."""


def configuration(engine: str, stage: int, passes: int, graphs: bool, world_size: int = 1) -> Any:
    return build_config({
        "model": {
            "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
        },
        "optimizer": {"tiger": {"learning_rate": 1e-2}, "compile": False},
        "train": {
            "sequence_length": LENGTH, "micro_batch_size": 1, "global_batch_size": passes * world_size, "precision": "bf16",
            "compile": True, "cuda_graphs": graphs,
        },
        "parallel": {"engine": engine, "zero_stage": stage},
    })  # fmt: skip


def batches(step: int, rank: int, passes: int) -> list[Batch]:
    ids = torch.randint(40, (passes, 1, LENGTH + 1), generator=torch.Generator().manual_seed(100 * step + rank))
    return [Batch(row[:, :-1].contiguous(), row[:, 1:].contiguous()) for row in ids]


@dataclass
class Seen:
    """Of one rank."""

    events: list[str]
    """begin, block and backward, in their order; begin! where a gradient was still held."""
    losses: list[float]
    weights: dict[str, list[float]]


class Watch:
    """Notes what happens in a network."""

    def __init__(self, model: Decoder):
        self.model, self.events = model, list[str]()
        model.begin = self.begin
        model.model.embed_tokens.register_forward_hook(lambda module, inputs, x_TD: self.embedded(x_TD))
        for block in model.model.layers:
            block.register_forward_hook(lambda module, inputs, x_TD: self.events.append("block"))

    def begin(self) -> None:
        held = any(parameter.grad is not None for parameter in self.model.parameters())
        self.events.append("begin!" if held else "begin")

    def embedded(self, x_TD: Tensor) -> None:
        if x_TD.requires_grad:
            x_TD.register_hook(lambda gradient: self.events.append("backward"))


def plainly(patch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled."""
    patch.setattr(torch, "compile", lambda function, **options: function)
    patch.setattr(loss, "_compiled_softmax", lambda: loss._whole_softmax)


def train(rank: int, world_size: int, cases: list[tuple[str, int, int, bool]]) -> list[Seen]:
    """A few steps of each case."""
    mesh, found = make_mesh(1, torch.device("cpu")), []
    with pytest.MonkeyPatch.context() as patch:
        plainly(patch)
        for engine, stage, passes, graphs in cases:
            trained: Any = make_engine(configuration(engine, stage, passes, graphs, world_size), mesh)
            watch, losses = Watch(trained.model), list[float]()
            for step in range(STEPS):
                losses.append(float(trained.accumulate(batches(step, rank, passes))))
                trained.update(1e-2)
            weights = {shard.name: shard.values.flatten().tolist() for shard in trained.shards()}
            trained.close()
            found.append(Seen(watch.events, losses, weights))
    return found


def test_every_forward_begins_once_after_the_backward_before_it_and_without_a_gradient() -> None:
    seen = run_ranks(train, 1, [(*case, True) for case in ENGINES])[0]
    for (engine, stage, passes), one in zip(ENGINES, seen, strict=True):
        wanted = (["begin"] + ["block"] * LAYERS + ["backward"]) * passes * STEPS
        assert one.events == wanted, (engine, stage, passes)


def test_stage_1_sums_alike_whether_it_keeps_gradients_or_not() -> None:
    for rank in run_ranks(train, 2, [("zero", 1, 3, False), ("zero", 1, 3, True)]):
        kept, dropped = rank
        assert "begin!" in kept.events and "begin!" not in dropped.events
        assert dropped.losses == kept.losses
        assert dropped.weights == kept.weights


def test_gradients_are_dropped_at_once_where_stage_1_would_keep_them() -> None:
    needed = []
    for graphs, precision, stage, passes in itertools.product((False, True), ("bf16", "fp32"), (1, 2, 3), (1, 2)):
        batch = {"micro_batch_size": 1, "global_batch_size": passes}
        parallel, of_train = ParallelConfig(zero_stage=stage), TrainConfig(cuda_graphs=graphs, precision=precision, **batch)  # type: ignore[arg-type]
        if deepspeed_config(parallel, of_train, Mesh())["bf16"]["immediate_grad_update"]:
            needed.append((graphs, precision, stage, passes))
    assert needed == [(True, "bf16", 1, 2)]


@pytest.mark.parametrize("graphs", [False, True])
def test_blocks_are_compiled_for_graphs_and_passes_marked_where_asked(graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    options, marks = [], []
    monkeypatch.setattr(torch, "compile", lambda function, **given: options.append(given["options"]) or function)
    monkeypatch.setattr(loss, "_compiled_softmax", lambda: loss._whole_softmax)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(1))
    model = build_network(configuration("fold", 1, 1, graphs), Mesh())
    assert options == [{"triton.cudagraphs": True} if graphs else None]
    evaluate(model, batches(0, 0, 3), Mesh())
    assert len(marks) == 3 * graphs


def test_what_has_other_shapes_never_enters_a_compiled_block() -> None:
    def refuse(graph: Any, inputs: Any) -> Any:
        raise AssertionError("a compiled block was called")

    model, mesh = build_network(build_config({}, ["model.vocab_size=40", "train.sequence_length=12"]), Mesh()), Mesh()
    model.run_block = torch.compile(model.run_block, backend=refuse)
    batch = batches(0, 0, 1)
    with pytest.raises(Exception, match="a compiled block was called"):
        evaluate(model, batch, mesh)
    assert evaluate_context(model, batch, mesh).context == 12
    assert len(list(generate(model, [[1, 2, 3]], 5))) == 5
    assert len(attention_statistics(model, batch[0].inputs_BS, mesh)) == model.config.num_hidden_layers


def test_nobody_measures_graphs_on_a_cpu() -> None:
    graphs = [one for one in CONTESTANTS if one.options.get("cuda_graphs")]
    assert len(graphs) == 2 and all(one.runs_on("cuda") and not one.runs_on("cpu") for one in graphs)
    assert all(one.runs_on("cpu") for one in CONTESTANTS if one not in graphs)
