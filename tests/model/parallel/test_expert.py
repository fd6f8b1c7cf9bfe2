"""Tokens that travel to the ranks of their experts, and back."""

import torch
import torch.distributed as dist

from model.parallel.expert import ALL_EXPERTS, ExpertParallel
from tests.ranks import run_ranks

COUNTS = {
    "uneven": [[1, 2, 0, 3], [4, 0, 1, 0]],
    "all for one expert": [[0, 0, 5, 0], [0, 0, 2, 0]],
    "nothing from one rank": [[0, 0, 0, 0], [1, 1, 1, 1]],
    "nothing at all": [[0, 0, 0, 0], [0, 0, 0, 0]],
}
"""For every rank: copies for each of four experts, of which each rank has two."""


def test_experts_are_divided_in_order() -> None:
    assert [ExpertParallel(4, rank).own(8) for rank in range(4)] == [range(0, 2), range(2, 4), range(4, 6), range(6, 8)]
    assert ALL_EXPERTS.own(5) == range(5)


def travel(rank: int, world_size: int) -> dict[str, tuple[list, list, list, list]]:
    """What arrives, its counts, what comes back twice as large, and the gradient of the rows that were sent."""
    ranks, found = ExpertParallel(world_size, rank, dist.group.WORLD), {}
    for name, counts in COUNTS.items():
        count_E = torch.tensor(counts[rank])
        rows = 100.0 * rank + torch.arange(float(count_E.sum()))[:, None].expand(-1, 3)
        x = rows.clone().requires_grad_()
        splits, received = ranks.tell(count_E)
        arrived = ranks.begin(x, splits).result()
        back = ranks.begin(arrived * 2.0, splits.back).result()
        (back * (rows + 1.0)).sum().backward()
        assert x.grad is not None and arrived.shape[0] == int(received.sum())
        found[name] = arrived[:, 0].tolist(), received.tolist(), back[:, 2].tolist(), x.grad[:, 1].tolist()
    return found


def test_rows_arrive_in_the_order_of_ranks_and_gradients_go_the_way_back() -> None:
    results = run_ranks(travel, 2)
    for name, counts in COUNTS.items():
        sent = [[100.0 * rank + row for row in range(sum(counts[rank]))] for rank in range(2)]
        for rank in range(2):
            arrived, received, back, gradient = results[rank][name]
            own = slice(2 * rank, 2 * rank + 2)
            starts = [sum(counts[source][: 2 * rank]) for source in range(2)]
            want = [row for source in range(2) for row in sent[source][starts[source] :][: sum(counts[source][own])]]
            assert arrived == want, name
            assert received == [counts[source][own] for source in range(2)], name
            assert back == [2.0 * row for row in sent[rank]], name
            assert gradient == [2.0 * (row + 1.0) for row in sent[rank]], name
