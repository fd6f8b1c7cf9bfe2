"""One step over fragments, however they are cut, is the step of one process on whole tensors."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from model.parallel.mesh import Mesh, make_mesh
from model.parameters import ONES, ParameterSpec, local_slice
from tests.ranks import run_ranks
from tests.trainer.reference import Reference
from tests.trainer.rules import EMBEDDING_ADAMW, SEEN, optimizer
from trainer.optimizers import step as step_module
from trainer.optimizers.config import OptimizerConfig
from trainer.optimizers.fragments import Fragment, fragment_of
from trainer.optimizers.norms import Measured
from trainer.optimizers.rates import UpdateStep
from trainer.optimizers.step import Optimizer, seen_rows

CPU = torch.device("cpu")
TENSORS = {
    "embed": ParameterSpec("embedding", (18, 5), 0),
    "column": ParameterSpec("matrix", (8, 6), 0),
    "row": ParameterSpec("matrix", (7, 8), 1),
    "whole": ParameterSpec("matrix", (5, 5), None),
    "zeros": ParameterSpec("matrix", (4, 3), None),
    "gain": ParameterSpec("gain", (6,), None, ONES),
    "bias": ParameterSpec("bias", (4,), 0),
}
KINDS = {name: spec.kind for name, spec in TENSORS.items()}
SETTINGS: list[dict[str, Any]] = [
    {"name": "tiger", "max_grad_norm": 0.0},
    {"name": "tiger", "rules": SEEN},
    {"name": "tiger", "embedding_rms": "row", "rules": SEEN, "non_finite": "shrink"},
    {"name": "tiger", "embedding_rms": "row", "weight_decay": 0.5},
    {"name": "tiger", "rules": {"embedding": {"rule": "adamw", "weight_decay": 0.1}}},
    {"name": "lion", "learning_rate": 1e-2},
    {"name": "lion", "rules": SEEN, "weight_decay": 0.3},
    {"name": "lion", "rules": EMBEDDING_ADAMW},
    {"name": "adamw", "learning_rate": 1e-2},
    {"name": "adamw", "rules": SEEN},
    {"name": "muon", "learning_rate": 1e-2, "precision": "fp32"},
    {
        "name": "muon",
        "precision": "fp32",
        "nesterov": False,
        "scale": "original",
        "newton_schulz": "polar-express",
        "newton_schulz_steps": 8,
        "others": "tiger",
        "weight_decay": 0.3,
    },
    {"name": "tiger", "rules": {"*o*": {"rule": "muon", "precision": "fp32", "scale": "mup", "learning_rate": 0.02}}},
    {"name": "adamw", "rules": {"c*": {"rule": "tiger", "learning_rate": 0.03}, "gain": {"rule": "lion", "betas": [0.5, 0.9]}}},
]
STEPS, BAD_STEP = 6, 3
FLOORS = {"embed": 0.9, "column": 0.02, "row": 0.03, "whole": 2.5, "zeros": 0.05, "gain": 9.0, "bias": 9.0}
"""Those of embed (some rows) and whole are above the RMS; gains and biases have no use for theirs."""


def start() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = {n: torch.randn(t.shape, generator=generator, dtype=torch.float64) for n, t in TENSORS.items()}
    values["zeros"].zero_()
    return values


def gradients(step: int, bad: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    found = {n: torch.randn(t.shape, generator=generator, dtype=torch.float64) for n, t in TENSORS.items()}
    if bad:
        found["column"][7, 5] = [torch.nan, torch.inf, -torch.inf][step % 3]
    return found


def rows_seen(step: int) -> Tensor:
    return torch.rand(18, generator=torch.Generator().manual_seed(step)) < 0.4


def cut(full: Tensor, spec: ParameterSpec, mesh: Mesh, partitioned: bool) -> tuple[int, Tensor]:
    """This rank's flat part of a whole tensor, and its offset in the slice."""
    shape, begin = local_slice(spec, mesh.tensor.size, mesh.tensor.rank)
    for dimension, (length, first) in enumerate(zip(shape, begin, strict=True)):
        full = full.narrow(dimension, first, length)
    flat = full.reshape(-1).clone()
    if not partitioned:
        return 0, flat
    share = math.ceil(flat.numel() / mesh.data.size)
    offset = mesh.data.rank * share
    return offset, flat[offset : offset + share]


def fragments_of(full: dict[str, Tensor], mesh: Mesh, partitioned: bool) -> list[Fragment]:
    return [fragment_of(n, t, mesh, *cut(full[n], t, mesh, partitioned)) for n, t in TENSORS.items()]


def walk(_: int, world_size: int, tensor_parallel_size: int, partitioned: bool) -> list[list[tuple]]:
    """STEPS updates under every setting; what this rank holds at the end of each."""
    mesh = make_mesh(tensor_parallel_size, CPU)
    return [march(optimizer(**chosen), mesh, partitioned) for chosen in SETTINGS]


def march(settings: OptimizerConfig, mesh: Mesh, partitioned: bool) -> list[tuple]:
    fragments = fragments_of(start(), mesh, partitioned)
    moves, norms = Optimizer(settings, fragments, mesh, FLOORS, partitioned), []
    for step in range(1, STEPS + 1):
        full = gradients(step, step == BAD_STEP)
        for fragment in fragments:
            fragment.gradient = cut(full[fragment.name], TENSORS[fragment.name], mesh, partitioned)[1]
        what = moves.update(UpdateStep(step, settings.rate, rows_seen(step)))
        assert bool(what.skipped) == (step == BAD_STEP)
        norms.append(what.grad_norm.item())
    # As numpy arrays: torch would hand tensors over by shared memory of a process that is about to end.
    states = [{key: state.numpy() for key, state in f.state.items()} for f in fragments]
    return [
        (f.name, f.slice_shape, f.slice_start, f.offset, f.values.numpy(), state, norms)
        for f, state in zip(fragments, states, strict=True)
    ]


def reference(settings: OptimizerConfig) -> tuple[Reference, list[float]]:
    found, norms = Reference(start(), KINDS, settings, FLOORS), []
    for step in range(1, STEPS + 1):
        given = gradients(step, step == BAD_STEP)
        norms.append(torch.stack([g.square().sum() for g in given.values()]).sum().sqrt().item())
        found.step(given, settings.rate, rows_seen(step), settings.clipping)
    return found, norms


def compare(wanted: Reference, norms: list[float], held: list[tuple]) -> None:
    """Every number of every whole tensor is held by some rank, and is the reference's."""
    covered = {name: torch.zeros(t.shape, dtype=torch.bool) for name, t in TENSORS.items()}
    for name, shape, begin, offset, values, state, seen_norms in held:
        place = tuple(slice(first, first + length) for first, length in zip(begin, shape, strict=True))
        part = slice(offset, offset + values.size)
        pairs = [(values, wanted.values[name]), (state["momentum"], wanted.m[name])]
        assert ("second_moment" in state) == (name in wanted.v)
        if name in wanted.v:
            pairs.append((state["second_moment"], wanted.v[name]))
        for mine, full in pairs:
            torch.testing.assert_close(torch.from_numpy(mine), full[place].reshape(-1)[part], rtol=1e-11, atol=1e-12)
        index = torch.arange(covered[name].numel()).view(covered[name].shape)[place].reshape(-1)[part]
        covered[name].view(-1)[index] = True
        torch.testing.assert_close(seen_norms, norms, rtol=1e-6, atol=0, equal_nan=True)
    assert all(mask.all() for mask in covered.values())


@pytest.mark.parametrize(
    ("world_size", "tensor_parallel_size", "partitioned"),
    [(1, 1, False), (2, 1, True), (2, 2, False), (4, 2, True), (3, 1, True)],
)
def test_every_cut_gives_the_step_of_one_process(world_size: int, tensor_parallel_size: int, partitioned: bool) -> None:
    if world_size == 1:
        ranks = [[march(optimizer(**chosen), Mesh(), partitioned) for chosen in SETTINGS]]
    else:
        ranks = run_ranks(walk, world_size, tensor_parallel_size, partitioned)
    for index, chosen in enumerate(SETTINGS):
        compare(*reference(optimizer(**chosen)), [part for rank in ranks for part in rank[index]])


def test_unseen_rows_stay_bit_for_bit() -> None:
    first = start()["embed"].float()
    fragment = fragment_of("embed", TENSORS["embed"], Mesh(), 0, first.clone().view(-1))
    seen = torch.arange(18) % 3 == 0
    moves = Optimizer(optimizer(rules=SEEN), [fragment], Mesh(), FLOORS, partitioned=False)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 101):
        fragment.gradient = torch.randn(90, generator=generator)
        moves.update(UpdateStep(step, 1e-3, seen))
    moved = fragment.values.view(18, 5) != first
    assert not moved[~seen].any() and moved[seen].all()
    assert fragment.state["momentum"].ne(0).all()


def masks(rank: int, world_size: int) -> list[bool]:
    mesh = make_mesh(1, CPU)
    ids = [[[1, 2], [3]], [[4], [1]]][rank]
    return seen_rows([torch.tensor([tokens]) for tokens in ids], 8, mesh).tolist()


def test_rows_are_collected_over_micro_batches_and_ranks() -> None:
    for mask in run_ranks(masks, 2):
        assert mask == [False, True, True, True, True, False, False, False]


def test_a_step_left_out_decays_states_only() -> None:
    for chosen in SETTINGS:
        settings = optimizer(**chosen)
        fragments = fragments_of(start(), Mesh(), False)
        moves = Optimizer(settings, fragments, Mesh(), FLOORS, partitioned=False)
        for fragment in fragments:
            for state in fragment.state.values():
                state.fill_(1.0)
        moves.leave_out(3)
        for fragment in fragments:
            assert torch.equal(fragment.values, start()[fragment.name].view(-1))
            rule: Any = moves.rule(fragment)
            wanted = {"tiger": ["beta"], "muon": ["beta"], "lion": [1], "adamw": [0, 1]}[moves.assigned[fragment.name].name]
            betas = [rule.beta if key == "beta" else rule.betas[key] for key in wanted]
            for state, beta in zip(fragment.state.values(), betas, strict=True):
                torch.testing.assert_close(state, torch.full_like(state, beta), rtol=1e-15, atol=0)


@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("chosen", SETTINGS, ids=str)
def test_numbers_that_stay_on_the_device_give_the_same_step(chosen: dict[str, Any], bad: bool) -> None:
    """On a GPU scale, rate and verdict are 0-dim tensors, so that nothing waits for them; on the CPU they are floats."""
    settings, results = optimizer(**chosen), []
    for number in (lambda x: x, torch.tensor):
        fragments = fragments_of(start(), Mesh(), False)
        moves = Optimizer(settings, fragments, Mesh(), FLOORS, partitioned=False)
        for fragment in fragments:
            fragment.gradient = gradients(1, bad)[fragment.name].view(-1)
            fragment.state["momentum"].fill_(0.25)
        rms = moves.measure().rms
        measured = Measured(
            {key: number(0.7) if key[1].over == "matrix" else value for key, value in rms.items()}, torch.ones(())
        )
        rates = moves.rates(UpdateStep(2, settings.rate, rows_seen(1)), measured)
        step_module._Update(moves, rates, number(0.0 if bad else 0.5), number(bad)).run()
        results.append([(fragment.values, fragment.state) for fragment in fragments])
    for (values, state), (other_values, other_state) in zip(*results, strict=True):
        torch.testing.assert_close(values, other_values, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(state, other_state, rtol=1e-6, atol=1e-8)
