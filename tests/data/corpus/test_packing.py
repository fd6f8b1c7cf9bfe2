import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.corpus.packing import best_fit, pack_corpus

pieces_and_size = st.integers(1, 40).flatmap(lambda size: st.tuples(st.lists(st.integers(1, size), max_size=80), st.just(size)))


@settings(max_examples=300, deadline=None)
@given(pieces_and_size)
def test_every_piece_goes_into_the_fullest_row_that_has_room_for_it(drawn):
    """Replayed piece by piece, from the longest on and in order among equals."""
    lengths, size = np.array(drawn[0], dtype=np.int64), drawn[1]
    row, rows = best_fit(lengths, size)
    free: dict[int, int] = {}
    for piece in sorted(range(len(lengths)), key=lambda piece: (-lengths[piece], piece)):
        fitting = [space for space in free.values() if space >= lengths[piece]]
        if fitting:
            assert free[row[piece]] == min(fitting)
        else:
            assert row[piece] not in free
        free[row[piece]] = free.get(row[piece], size) - lengths[piece]
    assert sorted(free) == list(range(rows)) and min(free.values(), default=0) >= 0


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 20))
def test_documents_stay_whole_and_every_token_is_in_one_row(lengths, size):
    bounds = np.cumsum([0, *lengths])
    packing = pack_corpus(bounds, size)
    seen, whole = np.zeros(bounds[-1], int), set()
    for row in range(packing.rows):
        pieces = packing.pieces(row)
        assert pieces == sorted(pieces) and 0 < sum(stop - start for start, stop in pieces) <= size
        assert all(stop in bounds for _, stop in pieces[:-1]), "a separator ends all but the last"
        for start, stop in pieces:
            seen[start:stop] += 1
            whole.add((start, stop))
    assert (seen == 1).all() and packing.covers(int(bounds[-1]))
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist()):
        cuts = [*range(start, stop, size), stop]
        assert {*pairwise(cuts)} <= whole, "cut in pieces of a whole row, and a rest"
    assert packing.cut == sum(length > size for length in lengths)


@pytest.mark.parametrize("fault", ["twice", "left out", "too full"])
def test_rows_that_do_not_hold_every_token_once_are_found(fault):
    packing = pack_corpus(np.array([0, 5, 7, 9, 12]), 5)
    assert packing.covers(12) and not packing.covers(13)
    match fault:
        case "twice":
            packing.starts[1] -= 1
        case "left out":
            packing.lengths[-1] -= 1
        case "too full":
            packing.firsts[1] = 2
    assert not packing.covers(12)


def test_a_million_documents_take_seconds():
    """Of 131,072 tokens at most, of almost as many lengths: the most that the lengths can take."""
    lengths = np.random.default_rng(0).integers(1, 131_072, 1_000_000)
    begin = time.process_time()
    packing = pack_corpus(np.concatenate([[0], np.cumsum(lengths)]), 131_072)
    assert time.process_time() - begin < 30
    assert packing.rows < 1.002 * -(-int(lengths.sum()) // 131_072)
    kept = packing.starts.nbytes + packing.lengths.nbytes + packing.firsts.nbytes
    assert kept == 12 * 1_000_000 + 8 * (packing.rows + 1)
