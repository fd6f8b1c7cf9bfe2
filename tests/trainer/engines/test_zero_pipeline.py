"""ZeRO 1 and 2 over stages: updates are those of plain formulas in float64 on whole tensors."""

import functools
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model.parallel.mesh import make_mesh
from tests.combinations.network import Shown, logits
from tests.ranks import run_ranks
from tests.trainer.engines import stages
from tests.trainer.engines.stages import CPU, Case, check, configuration, engine_of, holdings, micro_batch, micro_batches, rate

CASES = [
    Case("zero-1", "adamw", "plain", stages=4),
    Case("zero-2", "lion", "untied"),
    Case("zero-1", "muon", "half-swap", stages=4),
]
OF_TWO = [Case("zero-2", "adamw", "half-swap", stages=4, bucket_elements=700), Case("zero-1", "lion", "plain", micro_batches=2)]
MORE = [
    Case(engine, rule, head, layers, count)
    for engine, rule, head, layers, count in (
        ("zero-1", "adamw", "projection", 2, 4), ("zero-2", "muon", "plain", 4, 2), ("zero-2", "tiger-row", "untied", 4, 4),
        ("zero-1", "tiger", "half-swap", 2, 3), ("zero-2", "adamw", "plain", 2, 3), ("zero-1", "lion", "untied", 4, 3),
    )
]  # fmt: skip


@pytest.mark.parametrize(
    ("ranks", "pipeline", "cases"),
    [
        (2, 2, CASES[:2]),
        (4, 2, OF_TWO[:1]),
        pytest.param(2, 2, CASES[2:], marks=pytest.mark.slow),
        *(pytest.param(*each, [*OF_TWO, *MORE], marks=pytest.mark.slow) for each in ((2, 2), (4, 2), (6, 2))),
    ],
)
def test_updates_of_stages_are_those_of_one_process(ranks: int, pipeline: int, cases: list[Case]) -> None:
    """Clipping is by the norm of all stages, in which a tied embedding counts once, with the sum of its two gradients."""
    check(ranks, pipeline, cases, run_ranks)


@pytest.mark.slow
def test_updates_of_four_ranks_in_a_pipeline_are_those_of_one_process() -> None:
    chosen = [
        Case("zero-1", "adamw", "plain", 4, 4),
        Case("zero-2", "muon", "half-swap", 4, 5),
        Case("zero-2", "lion", "untied", 4, 7),
    ]
    check(4, 4, chosen, run_ranks)


def test_the_clipped_cases_clip_and_the_gradients_of_the_two_uses_do_not_add_up_to_one_norm() -> None:
    """Else a norm that counts them apart, or no clipping, would pass."""
    for case, data in ((CASES[0], 1), (OF_TWO[0], 2)):
        norms = stages.wanted(case.rule, case.head, case.micro_batches * data).norms
        assert min(norms) > 2 * stages.RULES[case.rule]["max_grad_norm"]


def state_of(engine: Any) -> list[np.ndarray]:
    """Copies of masters, momenta and the weights of the network."""
    own = [array for _, _, *arrays in holdings(engine) for array in arrays]
    return own + [parameter.detach().double().numpy().copy() for parameter in engine.model.parameters()]


def poison(engine: Any, stage: int, index: int) -> Any:
    """Make a gradient of one micro-batch on one stage infinite; the handle."""
    block = engine.model.blocks[-1] if engine.mesh.pipeline.rank == stage and engine.mesh.data.rank == 0 else None
    seen = []

    def infinite(gradient: Tensor) -> Tensor:
        seen.append(1)
        return gradient * (math.inf if len(seen) == index + 1 else 1.0)

    return None if block is None else block.mlp.down_proj.weight.register_hook(infinite)


def skipped(rank: int, world_size: int, engine_name: str, head: str) -> list[dict[str, Any]]:
    """Of an update with an infinite gradient on one stage, and of one that is left out."""
    warnings.filterwarnings("ignore")
    mesh, found = make_mesh(1, CPU, pipeline_parallel_size=2), []
    case = Case(engine_name, "adamw", head)
    for stage in (0, 1, None):
        engine = engine_of(case, mesh)
        for step in range(3):
            before = state_of(engine)
            handle = poison(engine, stage, 1) if step == 1 and stage is not None else None
            loss = engine.accumulate(micro_batches(step, mesh, case.micro_batches))
            result = engine.update(rate("adamw"), skip=step == 1 and stage is None)
            if handle is not None:
                handle.remove()
            number, after = len([*engine.model.parameters()]), state_of(engine)
            same = [bool((old == new).all()) for old, new in zip(before, after, strict=True)]
            held = len(before) - number
            masters, weights, momenta = same[:held:2], same[held:], zip(before[1:held:2], after[1:held:2], strict=True)
            decayed = all(np.allclose(new, 0.9 * old, rtol=1e-6, atol=0) for old, new in momenta)
            found.append({
                "step": step, "skipped": bool(result.skipped), "masters": masters, "weights": weights, "decayed": decayed,
                "norm": result.grad_norm.item(), "loss": loss.item(),
            })  # fmt: skip
        engine.close()
    return found


@pytest.mark.parametrize(
    ("ranks", "engine", "head"), [(2, "zero-1", "plain"), pytest.param(4, "zero-2", "untied", marks=pytest.mark.slow)]
)
def test_a_gradient_that_is_not_finite_on_one_stage_stops_the_update_on_all_ranks(ranks: int, engine: str, head: str) -> None:
    """The same as a step that is left out: the weights stay everywhere, and the momenta decay once."""
    for found in run_ranks(skipped, ranks, engine, head):
        for seen in found:
            assert math.isfinite(seen["loss"])
            if seen["step"] == 1:
                assert seen["skipped"] and seen["decayed"] and not math.isfinite(seen["norm"])
                assert all(seen["masters"]) and all(seen["weights"]), seen
            else:
                assert not seen["skipped"] and math.isfinite(seen["norm"]) and not any(seen["weights"]), seen


def resumed(rank: int, world_size: int, cases: list[Case], dtype: str) -> list[bool]:
    """Whether another engine, given the shards of one, has the same weights, and after an update the same bits."""
    warnings.filterwarnings("ignore")
    mesh, same = make_mesh(1, CPU, pipeline_parallel_size=2), []
    for case in cases:
        one, other = (engine_of(case, mesh, getattr(torch, dtype)) for _ in range(2))
        one.accumulate(micro_batches(0, mesh, case.micro_batches))
        one.update(rate(case.rule))
        other.accumulate(micro_batches(7, mesh, case.micro_batches))  # what has to be forgotten
        other.update(rate(case.rule))
        for mine, theirs in zip(other.shards(), one.shards(), strict=True):
            mine.values.copy_(theirs.values)
        other.loaded(1)
        weights = zip(one.model.parameters(), other.model.parameters(), strict=True)
        same.append(other.steps_done == 1 and all(torch.equal(a, b) for a, b in weights))
        for engine in (one, other):
            engine.accumulate(micro_batches(1, mesh, case.micro_batches))
            engine.update(rate(case.rule))
        same.append(all(map(np.array_equal, state_of(one), state_of(other))))
        one.close()
        other.close()
    return same


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "dtype"), [(2, "bfloat16"), (4, "float32")])
def test_an_engine_that_is_given_shards_has_their_weights_and_the_copy_of_a_tied_one_too(ranks: int, dtype: str) -> None:
    cases = [Case("zero-1", "adamw", "plain"), Case("zero-2", "lion", "untied", stages=4)]
    for same in run_ranks(resumed, ranks, cases[: 1 if ranks == 2 else 2], dtype):
        assert all(same)


def copies(rank: int, world_size: int) -> list[tuple[list[float], bool]]:
    """In bfloat16 after each update: the embedding of the ranks that have it, and whether it is its master rounded."""
    warnings.filterwarnings("ignore")
    mesh, found = make_mesh(1, CPU, pipeline_parallel_size=2), []
    case = Case("zero-1", "adamw", "plain", micro_batches=4)
    engine = engine_of(case, mesh, torch.bfloat16)
    for step in range(2):
        engine.accumulate(micro_batches(step, mesh, 4))
        engine.update(rate("adamw"))
        weight = engine.model.model.embed_tokens.weight.detach()
        own = [f.values for f in engine.fragments() if f.name == "model.embed_tokens.weight"]
        assert len(own) == (rank == 0)
        found.append((weight.float().flatten().tolist(), all(torch.equal(v.bfloat16().view_as(weight), weight) for v in own)))
    engine.close()
    return found


def test_the_two_weights_of_a_tied_embedding_stay_equal_and_one_master_is_behind_them() -> None:
    first, last = run_ranks(copies, 2)
    assert first == last or [w for w, _ in first] == [w for w, _ in last]
    assert all(rounded for _, rounded in first) and first[0][0] != first[1][0]


CLIPPED = 3.35


def clipped(rank: int, world_size: int) -> tuple[float, int, list[tuple[str, int, np.ndarray, np.ndarray]]]:
    """Bound of the logits, heads clipped, and what this rank holds after an update."""
    warnings.filterwarnings("ignore")
    mesh = make_mesh(1, CPU, pipeline_parallel_size=2)
    case = Case("zero-1", "adamw", "half-swap", stages=4)
    one, other = engine_of(case, mesh, qk_clip=CLIPPED), engine_of(case, mesh)
    for engine in (one, other):
        engine.accumulate(micro_batches(0, mesh, case.micro_batches))
    result = one.update(rate("adamw"))
    other.update(rate("adamw"))
    assert result.logit_bound is not None and result.heads_clipped is not None
    found = result.logit_bound.item(), int(result.heads_clipped), holdings(one)
    moved = [(*held, values) for held, (_, _, values, _) in zip(found[2], holdings(other), strict=True)]
    one.close()
    other.close()
    return found[0], found[1], moved  # type: ignore[return-value]


@functools.cache
def largest_logits() -> Tensor:
    """[L, N] of the update, by the formulas."""
    found: list[Tensor] = []
    for number in range(3):
        batch, shown = micro_batch(0, number), list[Shown]()
        logits(configuration("half-swap"), stages.plain("half-swap"), batch.inputs_BS, batch.cu_seqlens, shown=shown)
        found += [one.largest_LN for one in shown]
    return torch.stack(found).amax(dim=0)


@pytest.mark.slow
def test_heads_are_clipped_on_the_stage_that_has_them_and_counted_over_all() -> None:
    """Heads share keys, so that their queries get the whole factor."""
    largest = largest_logits()
    above = largest > CLIPPED
    assert above[:2].any() and above[2:].any() and not above.all(), largest
    for bound, heads, held in run_ranks(clipped, 2):
        assert bound == pytest.approx(largest.max().item(), rel=1e-4) and heads == int(above.sum())
        for name, _, values, _, unclipped in held:
            factors = np.ones(values.size)
            if ".q_proj." in name:
                layer = int(name.split(".")[2])
                of_head = torch.where(above[layer], CLIPPED / largest[layer], 1.0).repeat_interleave(8)
                factors = of_head.repeat_interleave(32).numpy()
            np.testing.assert_allclose(values, unclipped * factors, rtol=1e-5, atol=1e-7, err_msg=name)
