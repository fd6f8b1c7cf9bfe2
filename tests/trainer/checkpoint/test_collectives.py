"""Python objects between ranks."""

import torch.distributed as dist

from tests.ranks import run_ranks
from trainer.checkpoint.collectives import ObjectCollectives


def _exchange(rank: int, world_size: int) -> list[object]:
    ranks = ObjectCollectives(dist.group.WORLD)
    value = {"rank": ranks.rank, "text": "x" * (1000 * ranks.rank)}  # of different sizes
    return [ranks.world_size, ranks.broadcast(value), ranks.gather(value), ranks.all_gather(value)]


def test_each_rank_gets_what_it_should() -> None:
    values = [{"rank": rank, "text": "x" * (1000 * rank)} for rank in range(3)]
    first, *others = run_ranks(_exchange, 3)
    assert first == [3, values[0], values, values]
    assert others == [[3, values[0], [], values]] * 2


def test_one_process_speaks_to_nobody() -> None:
    ranks = ObjectCollectives(None)
    assert (ranks.rank, ranks.world_size) == (0, 1)
    assert [ranks.broadcast(5), ranks.gather(5), ranks.all_gather(5)] == [5, [5], [5]]
