from fractions import Fraction

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data.corpus.mixture import LONGEST_PERIOD, make_mixture, whole_shares


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=8))
def test_every_prefix_is_exact_to_one_sample(weights):
    turns = make_mixture([float(weight) for weight in weights])
    n = np.arange(2 * turns.period)
    source, number = turns.place(n)
    for j, weight in enumerate(weights):
        counts = np.cumsum(source == j)
        due = [(k + 1) * Fraction(weight, sum(weights)) for k in n]
        assert all(abs(int(count) - exact) < 1 for count, exact in zip(counts, due))
        assert np.array_equal(number[source == j], np.arange(counts[-1]))
    for count in (0, 1, turns.period, turns.period + 1):
        assert np.array_equal(turns.drawn(count), np.bincount(source[:count], minlength=len(weights)))


def test_decimals_are_taken_as_written():
    assert whole_shares([0.7, 0.2, 0.1]) == [7, 2, 1]
    assert whole_shares([1.0]) == [1]
    assert whole_shares([0.3, 0.3]) == [1, 1]


@settings(max_examples=10, deadline=None)
@given(st.lists(st.floats(0.01, 1e6), min_size=2, max_size=5))
def test_awkward_weights_are_rounded_to_the_grid(weights):
    shares = whole_shares(weights)
    assert sum(shares) <= LONGEST_PERIOD + len(weights)
    for share, weight in zip(shares, weights):
        assert share >= 1
        assert abs(share / sum(shares) - weight / sum(weights)) <= (len(weights) + 1) / LONGEST_PERIOD * 2


def test_the_billionth_sample_is_one_look_up():
    source, number = make_mixture([7, 3]).place(np.array([10**12, 10**12 + 9]))
    assert np.all(np.abs(number - np.array([10**12 * 7 // 10 if s == 0 else 10**12 * 3 // 10 for s in source])) <= 7)
