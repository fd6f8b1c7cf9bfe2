"""Layers cut into stages against every cut there is, and which of them a rank has."""

import itertools
import random

import pytest

from model.parallel.pipeline import WHOLE_NETWORK, PipelineParallel, cut_evenly


def cuts(layers: int, stages: int) -> list[tuple[int, ...]]:
    """All bounds of stages of at least one layer each, in ascending order."""
    return [(0, *inner, layers) for inner in itertools.combinations(range(1, layers), stages - 1)]


def cost(costs: list[int], bounds: tuple[int, ...]) -> tuple[int, int]:
    """The costliest stage, and the sum of the squares of all."""
    sums = [sum(costs[start:end]) for start, end in itertools.pairwise(bounds)]
    return max(sums), sum(each**2 for each in sums)


def test_no_other_cut_has_a_cheaper_costliest_stage_or_at_the_same_a_smaller_sum_of_squares():
    """Whole numbers, whose sums are exact; few different ones, so that cuts are equally good and the earliest is taken."""
    generator = random.Random(0)
    for _ in range(400):
        costs = [generator.choice((1, 2, 3, 7, 20)) for _ in range(generator.randint(1, 9))]
        for stages in range(1, len(costs) + 1):
            best = min(cuts(len(costs), stages), key=lambda bounds, costs=costs: (*cost(costs, bounds), bounds))
            assert cut_evenly(costs, stages) == best, (costs, stages)


def test_a_costly_last_layer_stands_alone_and_the_squares_decide_among_the_others():
    assert cut_evenly([1, 1, 1, 1, 9], 3) == (0, 2, 4, 5), "(0, 1, 4, 5) has the same costliest stage"
    assert cut_evenly([1.0] * 7, 3) == (0, 2, 4, 7)


def test_more_stages_than_layers_are_refused():
    with pytest.raises(ValueError, match=r"^3 layers cannot be cut into 4 stages$"):
        cut_evenly([1.0] * 3, 4)


def test_ranks_have_every_layer_once_and_stages_in_turn():
    for size, stages in ((2, 2), (2, 4), (3, 9), (4, 4)):
        bounds = cut_evenly([1.0] * 11, stages)
        ranks = [PipelineParallel(size, rank, None, bounds) for rank in range(size)]
        assert [[*rank.own] for rank in ranks] == [[*range(rank, stages, size)] for rank in range(size)]
        assert all(rank.stages == stages for rank in ranks)
        held = sorted(layer for rank in ranks for stage in rank.own for layer in rank.layers(stage, 11))
        assert held == [*range(11)]
        assert [layer for stage in range(stages) for layer in ranks[0].layers(stage, 11)] == held, "stages are in order"
        assert [rank.is_first for rank in ranks] == [True] + [False] * (size - 1)
        assert [rank.is_last for rank in ranks] == [False] * (size - 1) + [True]


def test_a_rank_alone_has_one_stage_of_all_layers():
    alone = WHOLE_NETWORK
    assert ([*alone.own], alone.stages, [*alone.layers(0, 5)]) == ([0], 1, [*range(5)])
    assert alone.is_first and alone.is_last
