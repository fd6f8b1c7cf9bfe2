"""What is faster is the same: compiled blocks against eager ones, in one graph, compiled once, under every engine."""

import functools
import shutil
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from launch.engine import make_engine
from launch.load_config import build_config
from launch.network import build_network
from model import loss
from model.parallel.mesh import Mesh, make_mesh
from tests.ranks import run_ranks

STEPS, LENGTH, LAYERS = 4, 24, 10
"""More layers than dynamo recompiles one function for (8): a graph for each layer would end in eager blocks."""


@dataclass
class Batch:
    inputs_BS: torch.Tensor
    targets_BS: torch.Tensor
    cu_seqlens: torch.Tensor | None = None


def configuration(engine: str, stage: int, tensor: int, world_size: int, compiled: bool, recompute: str) -> Any:
    return build_config({
        "model": {
            "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS,
            "num_attention_heads": 4, "num_key_value_heads": 2,
        },
        "optimizer": {"rounding": "nearest", "compile": False},
        "train": {
            "sequence_length": LENGTH, "micro_batch_size": 2, "global_batch_size": 4 * world_size // tensor,
            "precision": "fp32", "compile": compiled, "recompute": recompute,
        },
        "parallel": {"engine": engine, "zero_stage": stage, "tensor_parallel_size": tensor},
    })  # fmt: skip


def batches(step: int, rank: int) -> list[Batch]:
    """Two micro-batches, other lengths of documents every step."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    ids = torch.randint(64, (2, 2, LENGTH + 1), generator=generator)
    return [Batch(row[:, :-1].contiguous(), row[:, 1:].contiguous()) for row in ids]


def losses(
    rank: int, world_size: int, engine: str, stage: int, tensor: int, recompute: str, compiled: bool
) -> tuple[list[float], list[int]]:
    """The loss of every step, and the graphs compiled up to then."""
    config = configuration(engine, stage, tensor, world_size, compiled, recompute if compiled else "none")
    mesh = make_mesh(tensor, torch.device("cpu"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    # aot_eager traces as Inductor's compiler does and needs no C++ compiler
    compile_plainly = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda function, options=None: compile_plainly(function))
        softmax = compile_plainly(loss._whole_softmax)
        patch.setattr(loss, "_compiled_softmax", lambda: softmax)
        trained = make_engine(config, mesh)
        found, graphs = [], []
        for step in range(STEPS):
            found.append(float(trained.accumulate(batches(step, mesh.data.rank))))
            trained.update(1e-3)
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    breaks = dict(torch._dynamo.utils.counters["graph_break"])
    trained.close()
    assert not breaks, breaks
    return found, graphs


@pytest.mark.parametrize(
    ("engine", "stage", "tensor", "world_size", "recompute"),
    [
        ("zero", 1, 1, 1, "none"),
        ("zero", 2, 1, 2, "selective"),
        ("fold", 1, 1, 1, "full"),
        ("zero", 1, 2, 2, "none"),
        ("fold", 1, 2, 2, "selective"),
    ],
)
def test_compiled_blocks_are_one_graph_compiled_once_and_train_as_eager_ones(engine, stage, tensor, world_size, recompute):
    plain = run_ranks(losses, world_size, engine, stage, tensor, recompute, False)
    compiled = run_ranks(losses, world_size, engine, stage, tensor, recompute, True)
    for (want, no_graphs), (got, graphs) in zip(plain, compiled, strict=True):
        torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=1e-5, atol=0)
        assert no_graphs == [0] * STEPS
        assert graphs == [1 if tensor > 1 else 2] * STEPS, graphs  # of all blocks and, over a whole vocabulary, of the loss


def gradients(compiled: bool, recompute: str) -> torch.Tensor:
    """All gradients of a small bf16 network, in one vector."""
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = build_config({"model": sizes, "train": {"sequence_length": 40, "precision": "bf16", "compile": compiled}})
    model, ids = build_network(config, Mesh(), recompute), batches(0, 0)[0]
    model(ids.inputs_BS, ids.targets_BS)[0].backward()
    return torch.cat([parameter.grad.float().flatten() for parameter in model.parameters()])


@pytest.mark.filterwarnings("ignore")  # of torch's compiler about itself
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_what_inductor_makes_of_blocks_recomputation_and_attention_is_the_eager_network():
    want = gradients(False, "none")
    plain, selective = (gradients(True, how) for how in ("none", "selective"))
    assert (plain - want).norm() < 0.02 * want.norm()  # bf16 rounded at other places
    assert (selective - plain).norm() < 1e-3 * want.norm()
