"""ZeRO 1, 2, 3 and fold, over tensor and data ranks and micro-batches, against one float64 process on whole tensors.

The suite runs a cover of the combinations; all of them: pytest -m slow tests/trainer/engines/test_base.py
"""

import functools
import math
import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from model.config import ModelConfig
from model.decoder import Decoder
from model.initialization import initialise
from model.parallel.layers import serial_kit
from model.parallel.mesh import Mesh, make_kit, make_mesh
from model.positions.config import PositionConfig
from tests.ranks import run_ranks
from tests.trainer.reference import Reference
from tests.trainer.rules import EMBEDDING_ADAMW, SEEN, optimizer
from tests.trainer.tiny import VOCABULARY, WIDTH, Tiny, sequences, split
from trainer.config import ParallelConfig, TrainConfig
from trainer.engines.fold import Fold
from trainer.engines.zero import Zero

CPU = torch.device("cpu")
RULES: dict[str, dict[str, Any]] = {
    "tiger": {"name": "tiger", "max_grad_norm": 0.0},
    "tiger-row": {"name": "tiger", "embedding_rms": "row", "max_grad_norm": 0.0},
    "tiger-lazy": {"name": "tiger", "rules": SEEN, "max_grad_norm": 0.0},
    "tiger-row-lazy": {"name": "tiger", "rules": SEEN, "embedding_rms": "row", "max_grad_norm": 0.0},
    "tiger-adamw": {"name": "tiger", "rules": EMBEDDING_ADAMW},
    "lion": {"name": "lion"},
    "lion-lazy": {"name": "lion", "rules": SEEN},
    "lion-adamw": {"name": "lion", "rules": EMBEDDING_ADAMW},
    "adamw": {"name": "adamw"},
    "muon": {"name": "muon", "precision": "fp32"},
    "muon-momentum": {"name": "muon", "precision": "fp32", "nesterov": False, "others": "tiger", "max_grad_norm": 0.0},
}
FOLDED = ("muon-momentum", "tiger", "tiger-row", "tiger-lazy", "tiger-row-lazy")
LAYOUTS = {(1, 1): "one", (2, 1): "data", (2, 2): "tensor", (4, 2): "both"}
STEPS, SEQUENCES, LENGTH = 3, 6, 12


@dataclass(frozen=True)
class Case:
    engine: str
    rule: str
    micro_batches: int
    tied: bool
    sequences: int = SEQUENCES
    """Of an update."""


def cases() -> list[Case]:
    """Every engine with every rule it runs; a tied head wherever rows are not lazy and the count allows."""
    found = []
    for engine in ("zero-1", "zero-2", "zero-3", "fold"):
        for rule in FOLDED if engine == "fold" else RULES:
            for micro_batches in (1, 3):
                found.append(Case(engine, rule, micro_batches, tied="lazy" not in rule and micro_batches == 3))
    return found


def cover(world_size: int, tensor_parallel_size: int) -> list[Case]:
    """A share of the cases for each layout: together they hold every engine with every rule."""
    index = list(LAYOUTS).index((world_size, tensor_parallel_size))
    pairs = [cases()[position : position + 2] for position in range(0, len(cases()), 2)]
    return [pair[position // 3 % 2] for position, pair in enumerate(pairs) if position % 4 == index]


def network(tied: bool) -> ModelConfig:
    return ModelConfig(
        vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=tied, initializer_range=0.1,
    )  # fmt: skip


@dataclass
class Batch:
    inputs_BS: torch.Tensor
    targets_BS: torch.Tensor
    cu_seqlens: None = None


def floors(model: torch.nn.Module) -> dict[str, float]:
    """A floor for every parameter, some of them above its RMS."""
    return {name: 0.03 * (1 + index % 5) for index, (name, _) in enumerate(model.named_parameters())}


def tokens(step: int, sequences: int = SEQUENCES) -> Batch:
    """A global batch. Some ids never occur; sequences have unequal numbers of scored targets."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 40, (sequences, LENGTH + 1), generator=generator)
    targets = ids[:, 1:].clone()
    for row in range(sequences):
        targets[row, : 2 * row % LENGTH] = -100
    return Batch(ids[:, :-1], targets)


def micro_batches(step: int, mesh: Mesh, count: int, sequences: int = SEQUENCES) -> list[Batch]:
    whole = tokens(step, sequences)
    share = sequences // mesh.data.size
    mine = slice(mesh.data.rank * share, (mesh.data.rank + 1) * share)
    parts = zip(whole.inputs_BS[mine].chunk(count), whole.targets_BS[mine].chunk(count), strict=True)
    return [Batch(inputs, targets) for inputs, targets in parts]


def engine_of(case: Case, mesh: Mesh) -> Zero | Fold:
    model = Decoder(network(case.tied), PositionConfig(), LENGTH, make_kit(mesh))
    initialise(model, 0)
    settings = optimizer(**RULES[case.rule])
    if case.engine == "fold":
        return Fold(model, settings, mesh, seed=0, rms_floor=floors(model), bucket_numbers=2000)
    parallel = ParallelConfig(tensor_parallel_size=mesh.tensor.size, zero_stage=int(case.engine[-1]))  # type: ignore[arg-type]
    size = case.sequences // mesh.data.size // case.micro_batches
    train = TrainConfig(precision="fp32", micro_batch_size=size, global_batch_size=case.sequences)
    return Zero(model, parallel, settings, train, mesh, floors(model))


def run_case(case: Case, mesh: Mesh) -> dict[str, Any]:
    """A few updates; losses, gradient norms, and what this rank holds afterwards."""
    engine = engine_of(case, mesh)
    losses, norms = [], []
    for step in range(STEPS):
        losses.append(engine.accumulate(micro_batches(step, mesh, case.micro_batches, case.sequences)).item())
        norms.append(engine.update(optimizer(**RULES[case.rule]).rate).grad_norm.item())
    held = []
    for f in engine.fragments():
        state = {kind: moment.numpy().copy() for kind, moment in f.state.items()}
        held.append((f.name, f.slice_shape, f.slice_start, f.offset, f.values.numpy().copy(), state))
    engine.close()
    return {"losses": losses, "norms": norms, "held": held}


def run_cases(_: int, world_size: int, tensor_parallel_size: int, chosen: list[Case]) -> list[dict[str, Any]]:
    warnings.filterwarnings("ignore")  # DeepSpeed's own
    mesh = make_mesh(tensor_parallel_size, CPU)
    return [run_case(case, mesh) for case in chosen]


@dataclass
class Wanted:
    reference: Reference
    losses: list[float]
    norms: list[float]
    unsure: dict[str, torch.Tensor]
    """Entries whose direction hung on a momentum within rounding of zero in some step."""


@functools.cache
def wanted(rule: str, tied: bool, sequences: int) -> Wanted:
    """The same updates by autograd in float64 on whole tensors."""
    settings = optimizer(**RULES[rule])
    model = Decoder(network(tied), PositionConfig(), LENGTH, serial_kit(torch.float64))
    initialise(model, 0)
    weights = dict(model.named_parameters())
    kinds = {name: weight.spec.kind for name, weight in weights.items()}  # type: ignore[attr-defined]
    reference = Reference({n: w.detach() for n, w in weights.items()}, kinds, settings, floors(model))
    found = Wanted(reference, [], [], {n: torch.zeros(w.shape, dtype=torch.bool) for n, w in weights.items()})
    for step in range(STEPS):
        batch = tokens(step, sequences)
        loss_sum, count = model(batch.inputs_BS, batch.targets_BS)
        gradients = dict(zip(weights, torch.autograd.grad(loss_sum / count, list(weights.values())), strict=True))
        found.losses.append((loss_sum / count).item())
        found.norms.append(math.sqrt(sum(g.square().sum().item() for g in gradients.values())))
        before = {name: m.clone() for name, m in reference.m.items()}
        seen = torch.zeros(48, dtype=torch.bool)
        seen[batch.inputs_BS.reshape(-1)] = True
        reference.step(gradients, settings.rate, seen, settings.clipping)
        for name, m in reference.m.items():
            tested = m if settings.name != "lion" else 0.95 * before.get(name, torch.zeros_like(m)) + 0.05 * gradients[name]
            found.unsure[name] |= (tested.abs() < 1e-4 * tested.square().mean().sqrt()) & tested.ne(0)
    return found


def compare(case: Case, ranks: list[dict[str, Any]]) -> None:
    """Momenta to 1e-6 of their size; weights too, but for a few entries with a momentum of nearly zero."""
    goal = wanted(case.rule, case.tied, case.sequences)
    numbers = unsure = 0
    covered = {name: np.zeros(value.shape, bool) for name, value in goal.reference.values.items()}
    for rank in ranks:
        np.testing.assert_allclose(rank["losses"], goal.losses, rtol=2e-6)
        if case.engine != "fold":
            np.testing.assert_allclose(rank["norms"], goal.norms, rtol=1e-5)
        for name, shape, begin, offset, values, state in rank["held"]:
            place = tuple(slice(first, first + length) for first, length in zip(begin, shape, strict=True))
            part = slice(offset, offset + values.size)

            def own(full: torch.Tensor, place: tuple = place, part: slice = part) -> np.ndarray:
                return full[place].reshape(-1)[part].numpy()

            momentum = goal.reference.m[name]
            size = momentum.square().mean().sqrt().item()
            if values.size:
                error = np.abs(state["momentum"] - own(momentum))
                assert np.sqrt(np.square(error).mean()) <= 1e-6 * size, name
                assert error.max() <= 5e-6 * size, name
            sure = ~own(goal.unsure[name])
            np.testing.assert_allclose(values[sure], own(goal.reference.values[name])[sure], rtol=2e-6, atol=3e-7, err_msg=name)
            numbers, unsure = numbers + sure.size, unsure + int((~sure).sum())
            index = np.arange(covered[name].size).reshape(covered[name].shape)[place].reshape(-1)[part]
            covered[name].reshape(-1)[index] = True
    assert all(mask.all() for mask in covered.values())
    assert unsure <= 1e-3 * numbers


def check(world_size: int, tensor_parallel_size: int, chosen: list[Case], timeout_seconds: float = 280) -> None:
    ranks = run_ranks(run_cases, world_size, tensor_parallel_size, chosen, timeout_seconds=timeout_seconds)
    for index, case in enumerate(chosen):
        try:
            compare(case, [rank[index] for rank in ranks])
        except AssertionError as error:
            raise AssertionError(f"{case} on {world_size} ranks, {tensor_parallel_size} tensor-parallel: {error}") from error


@pytest.mark.parametrize(("world_size", "tensor_parallel_size"), LAYOUTS, ids=LAYOUTS.values())
def test_engines_agree_with_float64(world_size: int, tensor_parallel_size: int) -> None:
    check(world_size, tensor_parallel_size, cover(world_size, tensor_parallel_size))


def test_the_cover_holds_every_engine_with_every_rule() -> None:
    held = [case for layout in LAYOUTS for case in cover(*layout)]
    assert {(case.engine, case.rule) for case in held} == {(case.engine, case.rule) for case in cases()}
    for layout in LAYOUTS:
        assert {case.engine for case in cover(*layout)} == {"zero-1", "zero-2", "zero-3", "fold"}
        assert {case.micro_batches for case in cover(*layout)} == {1, 3}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("world_size", "tensor_parallel_size"), LAYOUTS, ids=LAYOUTS.values())
@pytest.mark.parametrize("engine", ["zero-1", "zero-2", "zero-3", "fold"])
def test_all_combinations(engine: str, world_size: int, tensor_parallel_size: int) -> None:
    check(world_size, tensor_parallel_size, [case for case in cases() if case.engine == engine], timeout_seconds=1700)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("world_size", "tensor_parallel_size"), [(3, 1), (4, 1), (6, 2)])
def test_whole_matrices_over_more_replicas(world_size: int, tensor_parallel_size: int) -> None:
    """Matrices cut in three, by ranks that hold other parts of other matrices."""
    chosen = [replace(case, sequences=36) for case in cases() if case.rule.startswith("muon")]
    check(world_size, tensor_parallel_size, chosen, timeout_seconds=800)


TINY_CASES = [
    ("zero-1", "adamw"),
    ("zero-1", "tiger-lazy"),
    ("zero-2", "lion-lazy"),
    ("zero-3", "tiger-adamw"),
    ("fold", "tiger-lazy"),
]
DRIFTING = [("zero-1", "tiger"), ("zero-2", "lion")]
SEEN_IDS = 16


def tiny_engine(engine: str, rule: str, mesh: Mesh) -> Zero | Fold:
    settings = optimizer(**RULES[rule])
    if engine == "fold":
        model = Tiny(False, torch.bfloat16)
        return Fold(model, settings, mesh, seed=0, rms_floor=floors(model), bucket_numbers=100)
    train = TrainConfig(precision="fp32", micro_batch_size=1, global_batch_size=4)
    parallel = ParallelConfig(zero_stage=int(engine[-1]))  # type: ignore[arg-type]
    model = Tiny(False, torch.float32)
    return Zero(model, parallel, settings, train, mesh, floors(model))


def tiny_steps(engine: Zero | Fold, rule: str, steps: range, rank: int) -> None:
    """Two micro-batches per rank; after the first step the upper ids never occur again."""
    for step in steps:
        whole = sequences(step, ids=VOCABULARY if step == 0 else SEEN_IDS)
        engine.accumulate(split(split(whole, 2)[rank], 2))  # type: ignore[arg-type]
        engine.update(optimizer(**RULES[rule]).rate)


def embedding_rows(engine: Zero | Fold) -> np.ndarray:
    """The embedding's rows on this rank, NaN where another rank holds them."""
    held = np.full(VOCABULARY * WIDTH, np.nan, np.float32)
    fragment = next(f for f in engine.fragments() if f.name == "embed")
    held[fragment.offset : fragment.offset + fragment.values.numel()] = fragment.values.float().numpy()
    return held.reshape(VOCABULARY, WIDTH)


def rare_rows(rank: int, world_size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    warnings.filterwarnings("ignore")
    mesh, found = make_mesh(1, CPU), []
    for name, rule in [case for case in TINY_CASES if "lazy" in case[1]] + DRIFTING:
        engine = tiny_engine(name, rule, mesh)
        tiny_steps(engine, rule, range(1), rank)
        before = embedding_rows(engine)
        tiny_steps(engine, rule, range(1, 101), rank)
        found.append((before, embedding_rows(engine)))
        engine.close()
    return found


def test_rows_of_absent_tokens_stay_bit_for_bit_and_drift_without_lazy() -> None:
    for rank in run_ranks(rare_rows, 2):
        lazy, drifting = rank[:-2], rank[-2:]
        for before, after in lazy:
            assert np.array_equal(before[SEEN_IDS:], after[SEEN_IDS:], equal_nan=True)
        for before, after in lazy + drifting:
            assert (before[:SEEN_IDS] != after[:SEEN_IDS])[~np.isnan(before[:SEEN_IDS])].any() or np.isnan(
                before[:SEEN_IDS]
            ).all()
        for before, after in drifting:
            moved = before[SEEN_IDS:] != after[SEEN_IDS:]
            assert np.isnan(before[SEEN_IDS:]).all() or moved[~np.isnan(before[SEEN_IDS:])].any()


def resumed(rank: int, world_size: int) -> list[bool]:
    """Three steps, then three more: in one run, and by another engine that was given the first one's shards."""
    warnings.filterwarnings("ignore")
    mesh, same = make_mesh(1, CPU), []
    for name, rule in TINY_CASES:
        engine = tiny_engine(name, rule, mesh)
        tiny_steps(engine, rule, range(3), rank)
        saved = {shard.name: shard.values.clone() for shard in engine.shards()}
        tiny_steps(engine, rule, range(3, 6), rank)
        wanted = {shard.name: shard.values.clone() for shard in engine.shards()}
        engine.close()
        other = tiny_engine(name, rule, mesh)
        tiny_steps(other, rule, range(7, 8), rank)  # anything that has to be forgotten
        for shard in other.shards():
            shard.values.copy_(saved[shard.name])
        other.loaded(3)
        tiny_steps(other, rule, range(3, 6), rank)
        same.append(all(torch.equal(shard.values, wanted[shard.name]) for shard in other.shards()))
        other.close()
    return same


def test_a_resumed_run_is_the_unbroken_one_bit_for_bit() -> None:
    for rank in run_ranks(resumed, 2):
        assert dict(zip(TINY_CASES, rank, strict=True)) == dict.fromkeys(TINY_CASES, True)
