import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.corpus.batches import BatchSizes


@st.composite
def sizes(draw):
    untils = sorted(draw(st.sets(st.integers(1, 30), max_size=4)))
    return BatchSizes(draw(st.integers(1, 5)), tuple((until, draw(st.integers(1, 5))) for until in untils))


@given(sizes(), st.integers(0, 40))
def test_the_samples_before_a_batch_are_those_of_all_batches_before(of, batch):
    assert of.before(batch) == sum(of.of(number) for number in range(batch))


@given(sizes(), sizes(), st.integers(0, 40))
def test_the_past_stays_and_the_future_is_new(old, new, batch):
    found = old.continued(batch, new)
    assert [found.of(n) for n in range(45)] == [(old if n < batch else new).of(n) for n in range(45)]
    assert found.continued(batch, new) == found and old.continued(batch, found) == found
    assert old.continued(batch, old) == old
    if [found.of(n) for n in range(45)] == [new.of(n) for n in range(45)]:
        assert found == new, "what was asked for is not put in other words"


@pytest.mark.parametrize(
    ("batch", "new", "ramp"),
    [
        (100, BatchSizes(16), ((100, 8),)),
        (0, BatchSizes(16), ()),
        (100, BatchSizes(8), ()),
        (100, BatchSizes(16, ((50, 4),)), ((100, 8),)),
        (100, BatchSizes(16, ((200, 12),)), ((100, 8), (200, 12))),
        (100, BatchSizes(16, ((100, 8),)), ((100, 8),)),
    ],
)
def test_a_run_of_eight_sequences_goes_on_with_another_number(batch, new, ramp):
    assert BatchSizes(8).continued(batch, new) == BatchSizes(new.last, ramp)


def test_in_words():
    assert BatchSizes(16).words() == "16" and BatchSizes(16, ((100, 8),)).words() == "8 until batch 100, then 16"


@given(sizes(), st.integers(0, 40))
def test_the_past_and_the_rest_are_parts_of_the_whole(of, batch):
    past, rest = of.until(batch), of.from_batch(batch)
    assert [past.of(n) for n in range(batch)] == [of.of(n) for n in range(batch)]
    assert all(past.of(n) == past.of(max(0, batch - 1)) for n in range(batch, 45))
    assert [rest.of(n) for n in range(45)] == [of.of(n) for n in range(batch, batch + 45)]
    assert {rest.of(n) for n in range(45)} == set(rest.each), "a size that is over is none of the rest"


@given(sizes(), sizes(), st.integers(0, 40))
def test_a_ramp_contradicts_what_was_done_where_it_says_something_else_of_it(new, done, batch):
    last = new.ramp[-1][0] if new.ramp else 0
    assert new.ramp_contradicts(done, batch) == any(new.of(n) != done.of(n) for n in range(min(batch, last)))
