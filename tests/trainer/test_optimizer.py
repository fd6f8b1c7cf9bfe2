"""One step over fragments, however they are cut, is the step of one process on whole tensors."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.layers import Logical, full_slice
from model.parallel import Topology, make_topology
from tests.ranks import run_ranks
from tests.trainer.reference import Reference
from trainer import adamw, lion, optimizer, tiger
from trainer.config import OptimizerConfig, ParallelConfig
from trainer.fragments import Fragment, blocks, fragment_of
from trainer.onepass import compiled, numbers, one_pass
from trainer.optimizer import allocate, check, decay_momentum, rate_and_decay, remarks, row_mask, rule, update
from trainer.totals import _squares, _total

CPU = torch.device("cpu")
TENSORS = {
    "embed": Logical("embedding", (18, 5), 0),
    "column": Logical("matrix", (8, 6), 0),
    "row": Logical("matrix", (7, 8), 1),
    "whole": Logical("matrix", (5, 5), None),
    "zeros": Logical("matrix", (4, 3), None),
    "gain": Logical("gain", (6,), None),
    "bias": Logical("bias", (4,), 0),
}
KINDS = {name: logical.kind for name, logical in TENSORS.items()}
SETTINGS: list[dict[str, Any]] = [
    {"name": "tiger", "max_grad_norm": 0.0},
    {"name": "tiger", "embedding": "lazy"},
    {"name": "tiger", "embedding_rms": "row", "embedding": "lazy", "non_finite": "shrink"},
    {"name": "tiger", "embedding_rms": "row", "weight_decay": 0.5},
    {"name": "tiger", "embedding": "adamw", "embedding_weight_decay": 0.1},
    {"name": "lion", "learning_rate": 1e-2},
    {"name": "lion", "embedding": "lazy", "weight_decay": 0.3},
    {"name": "lion", "embedding": "adamw"},
    {"name": "adamw", "learning_rate": 1e-2},
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


def seen_rows(step: int) -> Tensor:
    return torch.rand(18, generator=torch.Generator().manual_seed(step)) < 0.4


def cut(full: Tensor, logical: Logical, topology: Topology, partitioned: bool) -> tuple[int, Tensor]:
    """This rank's flat part of a whole tensor, and its offset in the slice."""
    shape, begin = full_slice(logical, topology.tensor_parallel_size, topology.tensor_parallel_rank)
    for dimension, (length, first) in enumerate(zip(shape, begin, strict=True)):
        full = full.narrow(dimension, first, length)
    flat = full.reshape(-1).clone()
    if not partitioned:
        return 0, flat
    share = math.ceil(flat.numel() / topology.data_parallel_size)
    offset = topology.data_parallel_rank * share
    return offset, flat[offset : offset + share]


def fragments_of(full: dict[str, Tensor], topology: Topology, partitioned: bool) -> list[Fragment]:
    return [fragment_of(n, t, topology, *cut(full[n], t, topology, partitioned)) for n, t in TENSORS.items()]


def walk(_: int, world_size: int, tensor_parallel_size: int, partitioned: bool) -> list[list[tuple]]:
    """STEPS updates under every setting; what this rank holds at the end of each."""
    topology = make_topology(tensor_parallel_size, CPU)
    return [march(OptimizerConfig(**chosen), topology, partitioned) for chosen in SETTINGS]


def march(settings: OptimizerConfig, topology: Topology, partitioned: bool) -> list[tuple]:
    fragments = fragments_of(start(), topology, partitioned)
    allocate(fragments, settings)
    norms = []
    for step in range(1, STEPS + 1):
        full = gradients(step, step == BAD_STEP)
        for fragment in fragments:
            fragment.gradient = cut(full[fragment.name], TENSORS[fragment.name], topology, partitioned)[1]
        what = update(
            fragments, settings, settings.rate, topology,
            step=step, rms_floor=FLOORS, seen_V=seen_rows(step), partitioned=partitioned,
        )  # fmt: skip
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
        found.step(given, settings.rate, seen_rows(step), settings.clipping)
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
        ranks = [[march(OptimizerConfig(**chosen), Topology(), partitioned) for chosen in SETTINGS]]
    else:
        ranks = run_ranks(walk, world_size, tensor_parallel_size, partitioned)
    for index, chosen in enumerate(SETTINGS):
        compare(*reference(OptimizerConfig(**chosen)), [part for rank in ranks for part in rank[index]])


def test_unseen_rows_stay_bit_for_bit() -> None:
    settings = OptimizerConfig(name="tiger", embedding="lazy")
    first = start()["embed"].float()
    fragment = fragment_of("embed", TENSORS["embed"], Topology(), 0, first.clone().view(-1))
    seen = torch.arange(18) % 3 == 0
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 101):
        fragment.gradient = torch.randn(90, generator=generator)
        update([fragment], settings, 1e-3, Topology(), step=step, rms_floor=FLOORS, seen_V=seen, partitioned=False)
    moved = fragment.values.view(18, 5) != first
    assert not moved[~seen].any() and moved[seen].all()
    assert fragment.momentum().ne(0).all()


def masks(rank: int, world_size: int) -> list[bool]:
    topology = make_topology(1, CPU)
    ids = [[[1, 2], [3]], [[4], [1]]][rank]
    return row_mask([torch.tensor([tokens]) for tokens in ids], 8, topology).tolist()


def test_rows_are_collected_over_micro_batches_and_ranks() -> None:
    for mask in run_ranks(masks, 2):
        assert mask == [False, True, True, True, True, False, False, False]


def test_a_step_left_out_decays_momenta_only() -> None:
    for chosen in SETTINGS:
        settings = OptimizerConfig(**chosen)
        fragments = fragments_of(start(), Topology(), False)
        allocate(fragments, settings)
        for fragment in fragments:
            for state in fragment.state.values():
                state.fill_(1.0)
        decay_momentum(fragments, settings)
        for fragment in fragments:
            assert torch.equal(fragment.values, start()[fragment.name].view(-1))
            beta = 0.9 if "second_moment" in fragment.state else settings.coefficients[-1]
            assert fragment.momentum().eq(beta).all()


@pytest.mark.parametrize(
    ("offset", "numbers", "width", "limit"), [(3, 40, 7, 1000), (0, 64, 8, 20), (5, 3, 10, 2), (9, 90, 10, 4), (0, 0, 3, 5)]
)
def test_blocks_are_rectangles_that_cover(offset: int, numbers: int, width: int, limit: int) -> None:
    position = 0
    for block in blocks(offset, numbers, width, limit):
        assert block.start == position and 0 < block.stop - block.start <= limit
        assert divmod(offset + block.start, width) == (block.row, block.column)
        columns, rest = divmod(block.stop - block.start, block.rows)
        assert rest == 0 and block.column + columns <= width and (block.rows == 1 or columns == width)
        position = block.stop
    assert position == numbers


TIED, UNTIED = ModelConfig(), ModelConfig(tie_word_embeddings=False)
ZERO, FOLD = ParallelConfig(), ParallelConfig(engine="fold")


@pytest.mark.parametrize(
    ("chosen", "model", "parallel", "reason"),
    [
        ({"embedding": "lazy"}, TIED, ZERO, "the softmax gives every row a gradient"),
        ({"embedding": "lazy", "name": "lion"}, TIED, ZERO, "untie the embeddings"),
        ({"embedding_rms": "row", "embedding": "adamw"}, UNTIED, ZERO, "adamw moves the embedding"),
        ({"embedding_rms": "row", "name": "lion"}, UNTIED, ZERO, "lion moves the embedding"),
        ({"name": "lion"}, UNTIED, FOLD, "Lion mixes momentum and mean gradient"),
        ({"name": "lion", "embedding": "adamw"}, UNTIED, FOLD, "Lion mixes"),
        ({"name": "adamw"}, TIED, FOLD, "optimizer.name = 'adamw'"),
        ({"embedding": "adamw"}, UNTIED, FOLD, "optimizer.embedding = 'adamw'"),
        ({"max_grad_norm": 1.0}, TIED, FOLD, "Tiger's sign bounds every step"),
    ],
)
def test_what_cannot_work_is_refused(chosen: dict, model: ModelConfig, parallel: ParallelConfig, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        check(OptimizerConfig(**chosen), model, parallel)
    assert "\n" not in str(caught.value)


def test_what_works_is_accepted() -> None:
    for parallel in (ZERO, FOLD):
        check(OptimizerConfig(), TIED, parallel)
        check(OptimizerConfig(embedding="lazy", max_grad_norm=0.0), UNTIED, parallel)
    check(OptimizerConfig(name="lion", embedding="adamw"), UNTIED, ZERO)


def test_an_absolute_rate_and_a_drifting_embedding_are_remarked() -> None:
    assert remarks(OptimizerConfig(), TIED) == []
    assert remarks(OptimizerConfig(name="adamw", learning_rate=3e-6), UNTIED) == []
    assert "relative to the RMS" in remarks(OptimizerConfig(learning_rate=3e-6), TIED)[0]
    assert "relative to the RMS" in remarks(OptimizerConfig(learning_rate=0.1), TIED)[0]
    assert "steadily" in remarks(OptimizerConfig(), UNTIED)[0]
    assert "exponentially" in remarks(OptimizerConfig(embedding_rms="row"), UNTIED)[0]
    assert remarks(OptimizerConfig(embedding="lazy"), UNTIED) == []


def one_pass_against_two(kernel: Callable[..., None]) -> None:
    generator = torch.Generator().manual_seed(0)
    for name in ("tiger", "lion"):
        settings = OptimizerConfig(name=name, weight_decay=0.1)
        for length, scale, bad in [(1000, 1.0, False), (64, 0.3, False), (777, 0.0, True)]:
            values, momentum, gradient = torch.randn(3, length, generator=generator)
            gradient[0] = torch.nan if bad else 1.0
            mine, theirs = [(values.clone(), momentum.clone()) for _ in range(2)]
            kernel(*mine, gradient, numbers(settings, torch.tensor([1e-3]), [0.1], scale, bad)[0])
            usable, betas = None if bad else gradient, settings.coefficients
            if name == "lion":
                lion.step_(*theirs, usable, (betas[0], betas[1]), 1e-3, 0.1, scale)
            else:
                tiger.fold_(theirs[1], usable, betas[0], (1 - betas[0]) * scale)
                if not bad:
                    tiger.move_(*theirs, 1e-3, 0.1)
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


def test_one_pass_is_the_published_rule() -> None:
    one_pass_against_two(one_pass)


@pytest.mark.slow
def test_the_compiled_pass_is_the_published_rule() -> None:
    one_pass_against_two(compiled(one_pass))


@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("chosen", SETTINGS, ids=str)
def test_numbers_that_stay_on_the_device_give_the_same_step(chosen: dict[str, Any], bad: bool) -> None:
    """On a GPU scale, rate and verdict are 0-dim tensors, so that nothing waits for them; on the CPU they are floats."""
    settings, results = OptimizerConfig(**chosen), []
    for number in (lambda x: x, torch.tensor):
        fragments = fragments_of(start(), Topology(), False)
        allocate(fragments, settings)
        verdict, scale = number(bad), number(0.0 if bad else 0.5)
        for fragment in fragments:
            fragment.gradient = gradients(1, bad)[fragment.name].view(-1)
            fragment.momentum().fill_(0.25)
        optimizer._adamw(fragments, settings, 1e-3, 2, scale, verdict)
        for fragment in fragments:
            if rule(fragment.kind, settings) != "adamw":
                rate, decay = rate_and_decay(fragment, settings, 1e-3, number(0.7), FLOORS, seen_rows(1))
                optimizer._signed(fragment, settings, rate, decay, scale, verdict)
        results.append([(fragment.values, fragment.state) for fragment in fragments])
    for (values, state), (other_values, other_state) in zip(*results, strict=True):
        torch.testing.assert_close(values, other_values, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(state, other_state, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("bad", [False, True])
def test_moments_rest_only_where_the_device_says_that_the_step_is_bad(bad: bool) -> None:
    first, second = (torch.randn(2, 1000, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    momenta, second_moments = list(first.clone()), list(second.clone())
    adamw._rest_if_(torch.tensor(bad), momenta, second_moments, (0.9, 0.95))
    if not bad:
        assert torch.equal(torch.stack(momenta), first) and torch.equal(torch.stack(second_moments), second)
    else:
        torch.testing.assert_close(torch.stack(momenta), 0.9 * first, rtol=3e-7, atol=0)
        torch.testing.assert_close(torch.stack(second_moments), 0.95 * second, rtol=3e-7, atol=0)


def test_a_scale_on_the_device_is_that_of_the_cpu_up_to_rounding() -> None:
    """The kernel divides by 1 / scale. Clipped gradients have any scale, not just a power of two."""
    results = []
    for number in (lambda x: x, lambda x: torch.tensor(x, dtype=torch.float64)):
        values, gradient, momentum, second = torch.randn(4, 999, generator=torch.Generator().manual_seed(0))
        step = {"step": 2, "betas": (0.9, 0.95), "rate": 1e-2, "decay": 0.1, "eps": 1e-8}
        adamw.step_([values], [gradient], [momentum], [second.abs_()], scale=number(0.3), **step)
        results.append((values, momentum, second))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("poison", [1.0, math.inf, math.nan])
def test_squares_of_all_tensors_at_once_are_those_of_each(poison: float) -> None:
    """The way of a GPU, here on tensors of a CPU: with parts that are empty, and numbers that are not finite."""
    flats = [torch.randn(length, generator=torch.Generator().manual_seed(length)) for length in (1000, 0, 7, 300)]
    flats[2][3] = poison
    weighted = list(zip(flats, [1.0, 0.5, 0.25, 0.125], strict=True))
    want, got = (_squares(weighted, torch.device(kind)) for kind in ("cpu", "cuda"))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0, equal_nan=True)
    torch.testing.assert_close(_total(got), got.sum(), rtol=1e-15, atol=0, equal_nan=True)
