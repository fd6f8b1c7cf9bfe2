"""Fold over stages: updates are those of plain formulas, and the two gradients of a tied embedding meet in one momentum."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from launch.config import RunConfig
from model.parallel.mesh import make_mesh
from tests.combinations.cases import SIZES, configured
from tests.combinations.network import micro_gradients
from tests.ranks import run_ranks
from tests.trainer.engines.stages import (
    CPU,
    LAYERS,
    Case,
    check,
    engine_of,
    holdings,
    micro_batch,
    micro_batches,
    plain,
    rate,
    run_case,
)  # fmt: skip
from tests.trainer.engines.test_zero_pipeline import poison
from trainer.engines.base import StepHooks

CASES = [
    Case("fold", "tiger", "plain", stages=4),
    Case("fold", "muon-momentum", "half-swap"),
    Case("fold", "tiger-row", "untied"),
]
OF_TWO = [Case("fold", "tiger", "half-swap", micro_batches=2, bucket_elements=700), Case("fold", "tiger", "untied", stages=4)]
MORE = [
    Case("fold", rule, head, stages, count)
    for rule, head, stages, count in (
        ("tiger", "projection", 2, 4), ("tiger-row", "plain", 4, 4), ("muon-momentum", "untied", 4, 3),
        ("tiger", "plain", 2, 2),
    )
]  # fmt: skip
EMBEDDING = "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("ranks", "pipeline", "cases"),
    [
        (2, 2, CASES[:2]),
        pytest.param(2, 2, CASES[2:], marks=pytest.mark.slow),
        *(pytest.param(*each, [*OF_TWO, *MORE], marks=pytest.mark.slow) for each in ((2, 2), (4, 2), (6, 2))),
    ],
)
def test_updates_of_stages_are_those_of_one_process(ranks: int, pipeline: int, cases: list[Case]) -> None:
    check(ranks, pipeline, cases, run_ranks)


@pytest.mark.slow
def test_updates_of_four_ranks_in_a_pipeline_are_those_of_one_process() -> None:
    check(4, 4, [Case("fold", "tiger", "plain", 4, 5), Case("fold", "muon-momentum", "untied", 4, 4)], run_ranks)


def norms(rank: int, world_size: int, pipeline: int, cases: list[Case]) -> list[float]:
    """Of one update."""
    mesh, found = make_mesh(1, CPU, pipeline_parallel_size=pipeline), []
    for case in cases:
        engine = engine_of(case, mesh)
        engine.accumulate(micro_batches(0, mesh, case.micro_batches))
        found.append(engine.update(rate(case.rule)).grad_norm.item())
        engine.close()
    return found


def apart() -> RunConfig:
    """The network of head `plain` with a head of its own."""
    return configured(model={**SIZES, "num_hidden_layers": LAYERS, "tie_word_embeddings": False})


def of_both_uses(number: int) -> tuple[float, float]:
    """Root mean square of the norms of the gradients of `number` micro-batches, by the formulas: with those of the two uses of
    the embedding counted apart, and with those counted as one."""
    weights = plain("plain")
    triples = [(b.inputs_BS, b.targets_BS, b.cu_seqlens) for b in (micro_batch(0, index) for index in range(number))]
    two, one = 0.0, 0.0
    for _, found in micro_gradients(apart(), {**weights, "lm_head.weight": weights[EMBEDDING]}, triples, torch.float64):
        two += sum(gradient.square().sum().item() for gradient in found.values())
        found[EMBEDDING] = found[EMBEDDING] + found.pop("lm_head.weight")
        one += sum(gradient.square().sum().item() for gradient in found.values())
    return math.sqrt(number * two), math.sqrt(number * one)


@pytest.mark.parametrize(("ranks", "pipeline"), [(2, 2), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_the_norm_counts_the_two_gradients_of_a_tied_embedding_apart(ranks: int, pipeline: int) -> None:
    cases = [Case("fold", "tiger", "plain", stages, 3) for stages in (2, 4)]
    two, one = of_both_uses(3 * ranks // pipeline)
    assert abs(two - one) > 5e-4 * one
    for found in run_ranks(norms, ranks, pipeline, cases):
        assert found == [pytest.approx(two, rel=1e-5)] * 2


def rounded(rank: int, world_size: int, cases: list[Case]) -> list[dict[str, Any]]:
    mesh = make_mesh(1, CPU, pipeline_parallel_size=2)
    return [run_case(case, mesh, dtype=torch.bfloat16) for case in cases]


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_same_layout_rounds_to_the_same_bits_twice_and_replicas_alike(ranks: int) -> None:
    """bfloat16, rounded stochastically; the copy of the embedding is the owner's bit for bit."""
    cases = [Case("fold", "tiger", "plain", stages=2 * pipeline) for pipeline in ((1,) if ranks == 2 else (1, 2))]
    first, again = (run_ranks(rounded, ranks, cases) for _ in range(2))
    for index in range(len(cases)):
        for one, other in zip(first, again, strict=True):
            for (name, _, *arrays), (_, _, *repeated) in zip(one[index]["held"], other[index]["held"], strict=True):
                assert all(map(np.array_equal, arrays, repeated)), name
        by_name: dict[str, list[np.ndarray]] = {}
        for rank in first:
            for name, weight in rank[index]["weights"].items():
                by_name.setdefault(name, []).append(weight)
        assert len(by_name[EMBEDDING]) == ranks
        for name, weights in by_name.items():
            assert all(np.array_equal(weights[0], weight) for weight in weights), name


def drawn(rank: int, world_size: int) -> list[tuple[int | str, ...]]:
    """Noise for the momenta that a rank draws in an update of three micro-batches in bfloat16."""
    purposes: list[tuple[int | str, ...]] = []
    engine: Any = engine_of(Case("fold", "tiger", "plain"), make_mesh(1, CPU, pipeline_parallel_size=2), torch.bfloat16)
    noise = engine._noise
    engine._noise = lambda *purpose: (purposes.append(purpose), noise(*purpose))[1]
    engine.accumulate(micro_batches(0, engine.mesh, 3))
    return purposes


def test_the_gradient_of_the_copy_is_folded_with_noise_of_its_own() -> None:
    """That of the last micro-batch again would round a momentum the same way twice."""
    first, last = run_ranks(drawn, 2)
    assert first == [("momentum", index) for index in range(4)] and last == first[:3]


def skipped(rank: int, world_size: int, head: str) -> list[dict[str, Any]]:
    """Of an update with an infinite gradient on one stage, and of one that is left out: what the weights and states are."""
    mesh, found = make_mesh(1, CPU, pipeline_parallel_size=2), []
    for stage in (0, 1, None):
        engine = engine_of(Case("fold", "tiger", head), mesh)
        for step in range(3):
            before = [parameter.detach().clone() for parameter in engine.model.parameters()]
            handle = poison(engine, stage, 1) if step == 1 and stage is not None else None
            engine.accumulate(micro_batches(step, mesh, 3))
            result = engine.update(rate("tiger"), skip=step == 1 and stage is None)
            if handle is not None:
                handle.remove()
            same = [torch.equal(old, new) for old, new in zip(before, engine.model.parameters(), strict=True)]
            finite = all(np.isfinite(momentum).all() for *_, momentum in holdings(engine))
            found.append({"step": step, "same": same, "finite": finite, "skipped": bool(result.skipped)})
        engine.close()
    return found


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_gradient_that_is_not_finite_on_one_stage_stops_the_update_on_all_ranks(ranks: int) -> None:
    for found in run_ranks(skipped, ranks, "plain"):
        for seen in found:
            assert seen["finite"]
            assert (seen["skipped"], set(seen["same"])) == ((True, {True}) if seen["step"] == 1 else (False, {False})), seen


def poisoned_copy(rank: int, world_size: int) -> list[tuple[bool, bool]]:
    """Of an update in which only the gradient of the copy of a tied embedding is infinite: skipped, and all is finite."""
    mesh, found = make_mesh(1, CPU, pipeline_parallel_size=2), []
    engine = engine_of(Case("fold", "tiger", "plain"), mesh)
    copy = engine.model.tied_copy
    handle = None if copy is None else copy.register_hook(lambda gradient: gradient * math.nan)
    for step in range(2):
        engine.accumulate(micro_batches(step, mesh, 3))
        result = engine.update(rate("tiger"))
        states = [array for _, _, *arrays in holdings(engine) for array in arrays]
        found.append((bool(result.skipped), all(np.isfinite(array).all() for array in states)))
        if handle is not None:
            handle.remove()
    return found


@pytest.mark.slow
def test_nan_of_the_copy_of_a_tied_embedding_stops_the_update_and_reaches_no_momentum() -> None:
    assert run_ranks(poisoned_copy, 2) == [[(True, True), (False, True)]] * 2


def resumed(rank: int, world_size: int) -> list[bool]:
    """Whether another engine that is given the shards has the same network, and after another update the same bits."""
    mesh, same = make_mesh(1, CPU, pipeline_parallel_size=2), []
    for case in (Case("fold", "tiger", "plain"), Case("fold", "muon-momentum", "untied", stages=4)):
        one, other = (engine_of(case, mesh, torch.bfloat16) for _ in range(2))
        for engine, step in ((one, 0), (other, 7)):
            engine.accumulate(micro_batches(step, mesh, 3))
            engine.update(rate(case.rule))
        for mine, theirs in zip(other.shards(), one.shards(), strict=True):
            mine.values.copy_(theirs.values)
        other.loaded(1)
        for step in range(2):
            weights = zip(one.model.parameters(), other.model.parameters(), strict=True)
            same.append(all(torch.equal(a, b) for a, b in weights))
            for engine in (one, other):
                engine.accumulate(micro_batches(1 + step, mesh, 3))
                engine.update(rate(case.rule))
        one.close()
        other.close()
    return same


@pytest.mark.slow
def test_an_engine_that_is_given_shards_has_their_weights_and_the_copy_of_a_tied_one_too() -> None:
    assert run_ranks(resumed, 2) == [[True] * 4] * 2


def announced(rank: int, world_size: int) -> list[str]:
    """Marks of an update, and where in it the change of the momenta is announced; "too late" if they have changed by then."""
    said, mesh = list[str](), make_mesh(1, CPU, pipeline_parallel_size=2)

    def changes() -> None:
        same = all(torch.equal(f.state["momentum"], before[f.name]) for f in engine.fragments())
        said.append("state changes" if same else "too late")

    engine = engine_of(
        Case("fold", "tiger", "plain"), mesh, hooks=StepHooks(said.append, lambda: pytest.fail("asked"), changes)
    )
    for step in range(2):
        before = {f.name: f.state["momentum"].clone() for f in engine.fragments()}
        engine.accumulate(micro_batches(step, mesh, 3))
    return [mark for mark in said if mark != "pipeline"]


def test_the_change_of_the_momenta_is_announced_once_before_the_first_backward_of_a_rank() -> None:
    for rank, said in enumerate(run_ranks(announced, 2)):
        order = "FF!BFBB" if rank == 0 else "F!BFBFB"
        assert said == 2 * [{"F": "forward", "B": "backward", "!": "state changes"}[each] for each in order]


def closed(rank: int, world_size: int) -> tuple[list[str], list[str]]:
    """Parameters with a gradient after an update, and without one after a pass once the engine is closed."""
    mesh = make_mesh(1, CPU, pipeline_parallel_size=2)
    engine: Any = engine_of(Case("fold", "tiger", "plain"), mesh)
    engine.accumulate(micro_batches(0, mesh, 3))
    kept = [name for name, parameter in engine.model.named_parameters() if parameter.grad is not None]
    engine.close()
    engine._passes.run(micro_batches(0, mesh, 3), torch.tensor(1.0))
    return kept, [name for name, parameter in engine.model.named_parameters() if parameter.grad is None]


@pytest.mark.slow
def test_no_gradient_is_kept_and_closing_removes_all_hooks() -> None:
    assert run_ranks(closed, 2) == [([], [])] * 2
