"""Experts that ranks split among themselves: updates are those of one process, from experts that differ."""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from launch.config import RunConfig
from launch.engine import make_engine
from launch.network import build_network
from model.parallel.mesh import Mesh, make_mesh
from model.parameters import tensors_of
from tests.combinations.cases import VOCABULARY, configured
from tests.ranks import run_ranks
from tests.trainer.engines.stages import Batch
from trainer.engines.expert_masters import hidden_from, stacks_of
from trainer.optimizers.fragments import Fragment

CPU = torch.device("cpu")
RULES: dict[str, dict[str, Any]] = {
    "adamw": {"name": "adamw", "adamw": {"learning_rate": 1e-3, "betas": [0.85, 0.95], "eps": 1e-4}, "max_grad_norm": 0.25},
    "tiger": {"name": "tiger", "tiger": {"learning_rate": 2e-3, "beta": 0.9}, "max_grad_norm": 0},
    "muon": {"name": "muon", "muon": {"learning_rate": 2e-3, "precision": "fp32"}, "max_grad_norm": 0.25},
}
STEPS, ROWS, S = 3, 8, 16


@dataclass(frozen=True)
class Case:
    """One layout."""

    rule: str
    engine: str = "zero-1"
    experts: int = 2
    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    micro_batch: int = 2
    sequence_parallel: bool = False
    recompute: str = "none"
    compiled: bool = False


def configuration(case: Case) -> RunConfig:
    """Large weights, losses of the router, and a first layer without experts."""
    engine, _, stage = case.engine.partition("-")
    return configured(
        model={
            "feed_forward": "moe", "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24,
            "first_k_dense_replace": 1, "num_hidden_layers": 4, "initializer_range": 0.2, "router_bias_rate": 0.05,
            "router_aux_loss_coef": 0.01, "router_z_loss_coef": 0.001, "num_attention_heads": 4, "vocab_size": 54,
        },
        train={
            "precision": "fp32", "global_batch_size": ROWS, "micro_batch_size": case.micro_batch, "sequence_length": S,
            "recompute": case.recompute, "compile": case.compiled,
        },
        optimizer=RULES[case.rule],
        parallel={
            "engine": engine, "zero_stage": int(stage or 1), "tensor_parallel_size": case.tensor,
            "context_parallel_size": case.context, "pipeline_parallel_size": case.pipeline,
            "expert_parallel_size": case.experts, "sequence_parallel": case.sequence_parallel,
            "reduce_bucket_elements": 3000,
        },
    )  # fmt: skip


def batches(step: int, mesh: Mesh, micro_batch: int) -> list[Batch]:
    """A data-parallel rank's micro-batches of an update; rows are the same whatever the layout."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, VOCABULARY, (ROWS, S + 1), generator=generator)
    own = ids.chunk(mesh.data.size)[mesh.data.rank]
    return [Batch(part[:, :-1], part[:, 1:].clone(), None) for part in own.split(micro_batch)]


def trained(rank: int, world_size: int, case: Case) -> dict[str, Any]:
    """Losses and norms, and of rank 0 of each stage what it holds of the masters; momenta too."""
    torch.set_num_threads(1)
    mesh = make_mesh(
        case.tensor, CPU, 60, case.context, case.pipeline, case.experts
    )  # fmt: skip
    engine = make_engine(configuration(case), mesh)
    losses, norms = [], []
    for step in range(STEPS):
        loss = engine.accumulate(batches(step, mesh, case.micro_batch))
        losses.append(float(loss))
        norms.append(float(engine.update(1e-3 if case.rule == "adamw" else 2e-3).grad_norm))
    held = [(f.name, place(f), f.values.numpy().copy(), f.state["momentum"].numpy().copy()) for f in engine.fragments()]
    own = {
        tensor.name: values.numpy().copy()
        for name, parameter in engine.model.owned_parameters().items()
        for tensor, values in zip(tensors_of(name, parameter), rows_of(name, parameter), strict=True)
    }
    biases = {shard.name: shard.values.numpy().copy() for shard in engine.shards() if "correction" in shard.name}
    engine.close()
    return {"losses": losses, "norms": norms, "held": held, "own": own, "biases": biases}


def rows_of(name: str, parameter: torch.nn.Parameter) -> torch.Tensor:
    """The values of each tensor that a parameter holds, flat."""
    return parameter.detach().reshape(len(tensors_of(name, parameter)), -1)


def place(f: Fragment) -> tuple[Any, ...]:
    return f.shape, f.slice_shape, f.slice_start, f.offset


def joined(results: list[dict[str, Any]], index: int) -> dict[str, np.ndarray]:
    """Full tensors from what the ranks hold of them."""
    full: dict[str, np.ndarray] = {}
    for result in results:
        for name, (shape, slice_shape, start, offset), *values in result["held"]:
            whole = full.setdefault(name, np.full(shape, np.nan))
            window = whole[tuple(slice(a, a + n) for a, n in zip(start, slice_shape, strict=True))]
            flat = window.reshape(-1).copy()
            flat[offset : offset + len(values[index])] = values[index]
            window[...] = flat.reshape(window.shape)
    return full


def biases_of(results: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Of all layers."""
    return {name: bias for result in results for name, bias in result["biases"].items()}


@functools.cache
def wanted(rule: str, engine: str) -> list[dict[str, Any]]:
    """One process that has all experts, under plain ZeRO 1, or folded."""
    return run_ranks(trained, 1, Case(rule, engine, experts=1))


def check(ranks: int, case: Case, tolerance: float = 1e-5) -> None:
    """Losses, norms, masters, momenta and biases are those of one process, and the network has the masters."""
    one, got = wanted(case.rule, "fold" if case.engine == "fold" else "zero-1"), run_ranks(trained, ranks, case)
    assert got[0]["losses"] == pytest.approx(one[0]["losses"], rel=tolerance)
    if case.engine != "fold":  # whose norm is of micro-batches, which are other ones on other ranks
        assert got[0]["norms"] == pytest.approx(one[0]["norms"], rel=tolerance)
    for index, scale in ((0, 1.0), (1, 10.0)):
        want, found = joined(one, index), joined(got, index)
        assert found.keys() == want.keys()
        for name, tensor in want.items():
            difference = np.abs(found[name] - tensor).max()
            assert difference <= scale * tolerance * max(np.abs(tensor).max(), 1e-3), f"{name}: {difference:.1e}"
    assert all(np.array_equal(biases_of(got)[name], bias) for name, bias in biases_of(one).items())
    assert any(np.abs(bias).max() > 0 for bias in biases_of(one).values())
    if case.tensor == 1:
        masters = joined(got, 0)
        for name, own in ((name, own) for result in got for name, own in result["own"].items()):
            assert np.array_equal(own, masters[name].reshape(-1).astype(np.float32)), f"the network's {name} is not its master"


@pytest.mark.parametrize(
    ("ranks", "case"),
    [(2, Case("adamw")), (2, Case("tiger", "fold", recompute="experts")), (4, Case("muon", "zero-2", tensor=2))],
)
def test_updates_of_split_experts_are_those_of_one_process(ranks: int, case: Case) -> None:
    check(ranks, case)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("engine", ["zero-1", "zero-2", "fold"])
def test_updates_are_the_same_however_many_ranks_split_the_experts(engine: str) -> None:
    """Alone and with tensor, context and pipeline parallelism, under every rule and recomputation."""
    rules = ("tiger",) if engine == "fold" else ("adamw", "tiger", "muon")
    for rule in rules:
        for ranks, case in (
            (2, Case(rule, engine)), (4, Case(rule, engine)), (4, Case(rule, engine, 4)),
            (4, Case(rule, engine, tensor=2)), (8, Case(rule, engine, 4, tensor=2, sequence_parallel=True)),
            (4, Case(rule, engine, 4, context=2)), (8, Case(rule, engine, tensor=2, context=2)),
            (4, Case(rule, engine, pipeline=2)), (8, Case(rule, engine, pipeline=2, tensor=2, micro_batch=1)),
            (2, Case(rule, engine, recompute="full")), (2, Case(rule, engine, recompute="selective")),
            (2, Case(rule, engine, recompute="experts")),
        ):  # fmt: skip
            check(ranks, case)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_compiled_blocks_exchange_tokens_too() -> None:
    for recompute in ("none", "experts", "selective", "full"):
        check(2, Case("tiger", recompute=recompute, compiled=True), 1e-4)


def initial_experts(rank: int, world_size: int) -> dict[str, np.ndarray]:
    """The rank's experts as the engine has made them."""
    engine = make_engine(configuration(Case("adamw")), make_mesh(1, CPU, 60, expert_parallel_size=world_size))
    found = {
        tensor.name: own.detach().numpy().copy()
        for name, stack in stacks_of(engine.model).items()
        for tensor, own in zip(tensors_of(name, stack), stack, strict=True)
    }
    engine.close()
    return found


def test_experts_start_as_they_were_drawn_and_are_no_copies_of_those_of_the_first_rank() -> None:
    """DeepSpeed broadcasts all that it is shown."""
    first, second = run_ranks(initial_experts, 2)
    assert not {*first} & {*second} and len(first) == len(second) == 3 * 3 * 4
    whole = build_network(configuration(Case("adamw", experts=1)), Mesh())
    for name, stack in stacks_of(whole).items():
        for tensor, expert in zip(tensors_of(name, stack), stack, strict=True):
            assert np.array_equal((first | second)[tensor.name], expert.detach().numpy()), tensor.name


def test_hidden_parameters_come_back_in_their_places() -> None:
    model = build_network(configuration(Case("adamw", experts=1)), Mesh())
    before = [(name, id(parameter)) for name, parameter in model.named_parameters()]
    with pytest.raises(KeyError), hidden_from(model, stacks_of(model)):
        assert stacks_of(model) == {} and len([*model.parameters()]) == len(before) - 9
        raise KeyError
    assert [(name, id(parameter)) for name, parameter in model.named_parameters()] == before


def test_the_norm_of_folded_experts_takes_the_micro_batches_of_all_their_ranks_as_one() -> None:
    """Two ranks with a micro-batch each: two gradients of the dense weights, and one of every expert."""
    case = Case("tiger", "fold", micro_batch=ROWS // 2)
    model, parts = build_network(configuration(case), Mesh()), []
    model.set_loss_scale(1.0 / (ROWS * S))
    for batch in batches(0, Mesh(), ROWS // 2):
        model.zero_grad()
        (model(batch.inputs_BS, batch.targets_BS)[0] / (ROWS * S)).backward()
        parts.append({name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None})
    experts = stacks_of(model).keys()
    dense = sum((2 * part[name]).square().sum() for part in parts for name in part if name not in experts) / 2
    together = sum((parts[0][name] + parts[1][name]).square().sum() for name in experts)
    got = run_ranks(trained, 2, case)
    assert got[0]["norms"][0] == pytest.approx(float((dense + together).sqrt()), rel=1e-5)
