"""Tensors are cut into buckets, sent in one order on all ranks, and averaged in float32."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.distributed as dist

from model.parallel.mesh import Axis
from tests.ranks import run_ranks
from trainer.engines.buckets import IN_FLIGHT, Buckets, bucket_indexes


@pytest.mark.parametrize("limit", [1, 5, 10, 100])
def test_buckets_keep_the_order_and_the_limit(limit: int) -> None:
    sizes = [3, 4, 12, 1, 1, 8, 5]
    buckets = bucket_indexes(sizes, limit)
    assert [index for bucket in buckets for index in bucket] == list(range(len(sizes)))
    for bucket in buckets:
        assert sum(sizes[index] for index in bucket) <= limit or len(bucket) == 1
    for bucket, following in pairwise(buckets):
        assert sum(sizes[index] for index in bucket) + sizes[following[0]] > limit, "not closed before it was full"


def averaged(rank: int, world_size: int, order: list[list[str]]) -> dict[str, np.ndarray]:
    """Two steps, in which each rank finishes the tensors in an order of its own."""
    names = [name for name in "abcde"]
    tensors = {name: torch.full((4,), float(index + 10 * rank)).bfloat16() for index, name in enumerate(names)}
    means, in_flight = {}, []

    def write(name: str, mean: torch.Tensor) -> None:
        assert mean.dtype == torch.float32
        means[name] = mean.numpy().copy()

    buckets = Buckets({name: 4 for name in names}, Axis(world_size, rank, dist.group.WORLD), 8, write)
    for _ in range(2):
        means.clear()
        for name in order[rank]:
            buckets.done(name, tensors[name])
            in_flight.append(len(buckets.sent))
        for name in names:
            buckets.done(name, tensors[name])
        buckets.finish()
        assert not buckets.sent and not buckets.ready
    assert max(in_flight) <= IN_FLIGHT
    return dict(means)


def test_ranks_that_finish_in_other_orders_get_the_same_means() -> None:
    for means in run_ranks(averaged, 2, [["a", "b", "c", "d", "e"], ["e", "c", "a"]]):
        assert {name: mean.tolist() for name, mean in means.items()} == {
            name: [index + 5.0] * 4 for index, name in enumerate("abcde")
        }


def test_one_rank_sends_nothing() -> None:
    buckets = Buckets({"a": 2}, Axis(), 8, lambda *_: pytest.fail("written"))
    buckets.done("a", torch.ones(2))
    buckets.finish()
