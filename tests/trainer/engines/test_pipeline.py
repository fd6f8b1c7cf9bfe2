"""Gradients of a network in stages are those of the whole network in one process, bit for bit."""

from typing import Any

import numpy as np
import pytest
import torch

from model.parallel.mesh import Mesh, make_mesh
from tests.combinations.network import micro_gradients
from tests.ranks import run_ranks
from tests.trainer.engines.stages import CPU, configuration, decoder, micro_batch, plain
from tests.trainer.tiny import Batch
from trainer.engines.base import StepHooks
from trainer.engines.pipeline import PipelinePasses

HEADS = ("plain", "untied")
EMBEDDING, SCALE = "model.embed_tokens.weight", 0.125
Found = tuple[float, dict[str, np.ndarray]]
"""Sum of the losses, and gradients by name."""


def passes(rank: int, world_size: int, stages: int, count: int, dtypes: list[str]) -> dict[tuple[str, str], Found]:
    """By head and dtype, after two updates of which the first is forgotten."""
    mesh, found = make_mesh(1, CPU, pipeline_parallel_size=world_size), {}
    for head in HEADS:
        for dtype in dtypes:
            model = decoder(head, mesh, stages, getattr(torch, dtype))
            kind = "1f1b" if stages == world_size else "interleaved"
            engine = PipelinePasses(model, kind, StepHooks())
            for step in range(2):
                model.zero_grad()
                batches = [micro_batch(step, number) for number in range(count)]
                loss = engine.run(batches, torch.tensor(SCALE, dtype=model.dtype))
            gradients = {n: p.grad.numpy().copy() for n, p in model.named_parameters() if p.grad is not None}
            assert len(gradients) == len([*model.parameters()])
            found[head, dtype] = loss.item(), gradients
    return found


def whole(head: str, dtype: str, count: int) -> Found:
    """The same by one network, of the second update."""
    model, total = decoder(head, Mesh(), 1, getattr(torch, dtype)), 0.0
    for number in range(count):
        batch = micro_batch(1, number)
        loss, _ = model(batch.inputs_BS, batch.targets_BS, cu_seqlens=batch.cu_seqlens)
        (loss * SCALE).backward()
        total += loss.item()
    return total, {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}  # type: ignore[union-attr]


def by_formulas(head: str, count: int) -> dict[str, np.ndarray]:
    batches = [micro_batch(1, number) for number in range(count)]
    triples = [(batch.inputs_BS, batch.targets_BS, batch.cu_seqlens) for batch in batches]
    targets, summed = sum(int((batch.targets_BS >= 0).sum()) for batch in batches), dict[str, Any]()
    for _, found in micro_gradients(configuration(head), plain(head), triples, torch.float64):
        summed = {name: summed.get(name, 0.0) + gradient.numpy() * targets * SCALE for name, gradient in found.items()}
    return summed


def compare(head: str, dtype: str, count: int, ranks: list[Found]) -> None:
    """The two uses of a tied embedding are added in another order, so that its gradient may differ in the last bits."""
    (total, want), formulas = whole(head, dtype, count), by_formulas(head, count)
    losses, held = [loss for loss, _ in ranks], dict[str, Any]()
    assert losses[:-1] == [0.0] * (len(ranks) - 1) and losses[-1] == pytest.approx(total, rel=1e-6)
    for _, gradients in ranks:
        for name, gradient in gradients.items():
            held[name] = held[name] + gradient if name in held else gradient
    tied = {EMBEDDING} if head == "plain" else set[str]()
    assert {name for _, gradients in ranks[1:] for name in gradients} & {EMBEDDING} == tied
    assert held.keys() == want.keys() == formulas.keys()
    for name, gradient in held.items():
        exact, size = 1e-14 if dtype == "float64" else 1e-5, np.abs(formulas[name]).max()
        np.testing.assert_allclose(gradient, formulas[name], rtol=0, atol=100 * exact * size, err_msg=name)
        if name in tied:
            np.testing.assert_allclose(gradient, want[name], rtol=0, atol=exact * size, err_msg=name)
        else:
            assert np.array_equal(gradient, want[name]), f"{head}, {dtype}: {name}"


@pytest.mark.parametrize(
    ("ranks", "stages", "count", "dtypes"),
    [
        (2, 4, 3, ["float32"]), pytest.param(2, 4, 3, ["float64"], marks=pytest.mark.slow),
        pytest.param(2, 2, 4, ["float64", "float32"], marks=pytest.mark.slow),
        pytest.param(2, 4, 8, ["float64", "float32"], marks=pytest.mark.slow),
        pytest.param(4, 4, 6, ["float64", "float32"], marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_gradients_of_stages_are_those_of_the_whole_network(ranks: int, stages: int, count: int, dtypes: list[str]):
    by_rank = run_ranks(passes, ranks, stages, count, dtypes)
    for head in HEADS:
        for dtype in dtypes:
            compare(head, dtype, count, [rank[head, dtype] for rank in by_rank])


def marks(rank: int, world_size: int, count: int) -> tuple[list[str], list[tuple[int, int]], int]:
    """What is marked in an update, which backwards are announced, and how often the network begins."""
    mesh, marked, backwards, begun = make_mesh(1, CPU, pipeline_parallel_size=world_size), [], [], []
    model = decoder("untied", mesh, world_size)
    model.begin = lambda: begun.append(1)
    hooks = StepHooks(marked.append, lambda: pytest.fail("asked whether to leave"))
    engine = PipelinePasses(model, "1f1b", hooks, lambda stage, index: backwards.append((stage, index)))
    engine.run([micro_batch(0, number) for number in range(count)], torch.tensor(1.0))
    return marked, backwards, len(begun)


def test_every_pass_is_marked_and_before_it_that_a_rank_has_waited():
    count, ranks = 4, 2
    for rank, (marked, backwards, begun) in enumerate(run_ranks(marks, ranks, count)):
        warmup = ranks - rank
        order = "F" * warmup + "BF" * (count - warmup) + "B" * warmup
        assert marked == [mark for each in order for mark in ("pipeline", {"F": "forward", "B": "backward"}[each])]
        assert backwards == [(rank, index) for index in range(count)] and begun == count


def sizes(rank: int, world_size: int) -> list[bool]:
    """Whether updates of other numbers and lengths of micro-batches leave each other's gradients as they are alone."""
    mesh, same = make_mesh(1, CPU, pipeline_parallel_size=world_size), []
    model = decoder("untied", mesh, world_size)
    engine, first = PipelinePasses(model, "1f1b", StepHooks()), dict[tuple[int, int], Any]()
    for count, length in 2 * [(2, 24), (3, 24), (2, 16)]:
        model.zero_grad()
        rows = (micro_batch(0, index) for index in range(count))
        loss = engine.run([Batch(r.inputs_BS[:, :length], r.targets_BS[:, :length]) for r in rows], torch.tensor(1.0))
        got = [loss, *(parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None)]
        same.append(all(map(torch.equal, got, first.setdefault((count, length), got))))
    return same


def test_updates_of_other_sizes_come_in_turn():
    assert run_ranks(sizes, 2) == [[True] * 6] * 2
