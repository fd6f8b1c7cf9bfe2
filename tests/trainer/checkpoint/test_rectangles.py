"""Cutting flat pieces into rectangles."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.checkpoint.rectangles import (
    MIN_PART_ELEMENTS,
    Rectangle,
    Shard,
    check_shard,
    flat_rectangles,
    shard_rectangles,
    share_to_write,
)

shapes = st.lists(st.integers(1, 6), min_size=0, max_size=3).map(tuple)


@settings(deadline=None)
@given(shapes, st.data())
def test_a_cut_covers_the_flat_range_once_and_in_order(shape: tuple[int, ...], data: st.DataObject) -> None:
    size = math.prod(shape)
    first = data.draw(st.integers(0, size))
    last = data.draw(st.integers(first, size))
    tensor = torch.arange(size).view(shape)
    boxes = list(flat_rectangles(first, last - first, shape))
    seen = [tensor[tuple(slice(a, a + n) for a, n in zip(box.start, box.extent))].flatten() for box in boxes]
    assert torch.equal(torch.cat([torch.empty(0, dtype=torch.int64), *seen]), torch.arange(first, last))
    assert len(boxes) <= (3 if len(shape) == 2 else 5)


def test_padding_is_in_no_rectangle() -> None:
    """5 x 4 padded to 8 x 4 over two ranks; the second holds row 4 and three more, cut in the middle of them."""
    shard = Shard("weight/x", (5, 4), (4, 4), (4, 0), 2, torch.arange(9), padding=3)
    check_shard(shard)
    ((rectangle, values),) = shard_rectangles(shard)
    assert rectangle == Rectangle((4, 2), (1, 2)) and values.tolist() == [0, 1]
    with pytest.raises(ValueError, match="does not fit"):
        check_shard(Shard("weight/x", (5, 4), (4, 4), (4, 0), 2, torch.arange(9)))


def test_rows_cut_in_the_middle_give_three_rectangles() -> None:
    """33 x 8 over two ranks is 16.5 rows each (DeepSpeed ZeRO)."""
    assert list(flat_rectangles(0, 132, (33, 8))) == [Rectangle((0, 0), (16, 8)), Rectangle((16, 0), (1, 4))]
    assert list(flat_rectangles(132, 132, (33, 8))) == [Rectangle((16, 4), (1, 4)), Rectangle((17, 0), (16, 8))]
    assert list(flat_rectangles(3, 14, (3, 8))) == [
        Rectangle((0, 3), (1, 5)),
        Rectangle((1, 0), (1, 8)),
        Rectangle((2, 0), (1, 1)),
    ]


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(1, 9), st.integers(1, 40))
def test_rows_of_a_box_stay_below_the_limit(height: int, width: int, most: int) -> None:
    box = Rectangle((2, 3), (height, width))
    parts = list(box.rows(most))
    assert sum(part.numel for part in parts) == box.numel
    assert all(part.numel <= most or part.extent[0] == 1 for part in parts)
    assert [part.start[0] for part in parts] == [2 + sum(p.extent[0] for p in parts[:i]) for i in range(len(parts))]


@settings(deadline=None)
@given(st.sampled_from([10, MIN_PART_ELEMENTS, 3 * MIN_PART_ELEMENTS + 1]), st.integers(1, 5), st.text("abc", min_size=1))
def test_replicas_write_every_number_once(size: int, count: int, name: str) -> None:
    values = torch.zeros(size, dtype=torch.uint8)
    written = torch.zeros(size, dtype=torch.uint8)
    for index in range(count):
        part = share_to_write(Shard(name, (size,), (size,), (0,), 0, values, (index, count)))
        if part is not None:
            written[part.offset : part.offset + part.values.numel()] += 1
    assert bool((written == 1).all())


def test_a_slice_is_placed_in_the_full_tensor() -> None:
    shard = Shard("w", (6, 8), (6, 4), (0, 4), 2, torch.arange(7.0))
    assert [(box, values.tolist()) for box, values in shard_rectangles(shard)] == [
        (Rectangle((0, 6), (1, 2)), [0.0, 1.0]),
        (Rectangle((1, 4), (1, 4)), [2.0, 3.0, 4.0, 5.0]),
        (Rectangle((2, 4), (1, 1)), [6.0]),
    ]


@pytest.mark.parametrize(
    "shard",
    [
        Shard("w", (6, 8), (6, 4), (0, 5), 0, torch.zeros(24)),
        Shard("w", (6, 8), (6, 4), (0, 4), 1, torch.zeros(24)),
        Shard("w", (6, 8), (6, 4), (0, 4), 0, torch.zeros(6, 4)),
        Shard("w", (6, 8), (48,), (0,), 0, torch.zeros(48)),
        Shard("w", (48,), (48,), (0,), 0, torch.zeros(96)[::2]),
    ],
)
def test_a_shard_that_contradicts_itself_is_refused(shard: Shard) -> None:
    with pytest.raises(ValueError, match="shard w does not fit"):
        check_shard(shard)
