import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data.corpus.order import permute, round_keys


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 5000), st.integers(0, 2**60))
def test_it_is_a_permutation(size, seed):
    image = permute(np.arange(size), size, round_keys(seed))
    assert np.array_equal(np.sort(image), np.arange(size))


@settings(max_examples=50, deadline=None)
@given(st.integers(10**12, 2**62), st.lists(st.integers(0, 10**12 - 1), min_size=2, unique=True))
def test_huge_sizes_stay_inside_and_apart(size, index):
    image = permute(np.array(index), size, round_keys("seed"))
    assert image.min() >= 0 and image.max() < size and len(set(image.tolist())) == len(index)


def test_keys_decide_and_batches_do_not():
    index = np.arange(1000)
    whole = permute(index, 1000, round_keys(1, "corpus", 0))
    assert np.array_equal(whole, permute(index, 1000, round_keys(1, "corpus", 0)))
    assert not np.array_equal(whole, permute(index, 1000, round_keys(1, "corpus", 1)))
    assert np.array_equal(whole[300:310], permute(index[300:310], 1000, round_keys(1, "corpus", 0)))


def test_the_order_looks_random():
    """Every place is as likely for every sample: chi-squared over 8,000 keys within five deviations of its mean."""
    size, keys = 12, 8000
    hits = np.zeros((size, size))
    for seed in range(keys):
        hits[np.arange(size), permute(np.arange(size), size, round_keys(seed))] += 1
    expected, freedom = keys / size, (size - 1) ** 2
    chi_squared = ((hits - expected) ** 2 / expected).sum()
    assert abs(chi_squared - freedom) < 5 * np.sqrt(2 * freedom)
    large = permute(np.arange(100_000), 100_000, round_keys(0))
    assert abs(np.corrcoef(large[:-1], large[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(np.arange(100_000), large)[0, 1]) < 0.02
