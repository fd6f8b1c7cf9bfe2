"""Pipeline parallelism: the layers of a network cut into stages, which ranks have one after the other.

Rank r of n has stage r, or, interleaved, the stages r, n + r, 2 n + r, ... (Narayanan et al. 2021, Efficient Large-Scale
Language Model Training on GPU Clusters Using Megatron-LM, section 2.2). A rank makes the blocks of its own stages and nothing
else of the network but, with the first stage, the embedding, and with the last, the final norm and the head.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class PipelineParallel:
    """The ranks that have the stages of a network, as one of them sees it."""

    size: int = 1
    rank: int = 0
    group: Any = None
    bounds: tuple[int, ...] = ()
    """First layer of every stage, and the number of layers behind the last; empty: one stage has all."""

    @property
    def stages(self) -> int:
        """Of all ranks."""
        return max(1, len(self.bounds) - 1)

    @property
    def own(self) -> range:
        """This rank's stages."""
        return range(self.rank, self.stages, self.size)

    @property
    def is_first(self) -> bool:
        """Whether this rank has the first stage."""
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        """Whether this rank has the last stage."""
        return self.rank == self.size - 1

    def layers(self, stage: int, count: int) -> range:
        """The layers of a stage of a network of `count` layers."""
        return range(self.bounds[stage], self.bounds[stage + 1]) if self.bounds else range(count)

    def send(self, x: Tensor, stage: int) -> None:
        """Send to the rank of a stage, and wait until it is sent."""
        dist.send(x.contiguous(), group=self.group, group_dst=stage % self.size)

    def receive(self, x: Tensor, stage: int) -> Tensor:
        """x, filled with what the rank of a stage sends."""
        dist.recv(x, group=self.group, group_src=stage % self.size)
        return x

    def from_last(self, x: Tensor) -> Tensor:
        """x of the rank with the last stage, on all ranks, in place."""
        if self.size > 1:
            dist.broadcast(x, group=self.group, group_src=self.size - 1)
        return x


WHOLE_NETWORK = PipelineParallel()


def cut_evenly(costs: Sequence[float], stages: int) -> tuple[int, ...]:
    """Bounds of stages of consecutive layers, at least one each, of which the costliest costs as little as can be; among such
    cuts that with the least sum of squares, and then with the fewest layers in the first stages, which keep most activations.

    Args:
        costs: of each layer.

    Raises:
        ValueError: more stages than layers.
    """
    if stages > len(costs):
        raise ValueError(f"{len(costs)} layers cannot be cut into {stages} stages")
    sums = [0.0, *accumulate(costs)]
    largest, _ = _best_cut(sums, stages, max)
    return _best_cut(sums, stages, lambda before, cost: before + cost * cost if cost <= largest else math.inf)[1]


def _best_cut(
    sums: Sequence[float], stages: int, joined: Callable[[float, float], float]
) -> tuple[float, tuple[int, ...]]:  # fmt: skip
    """What a cut is worth, which is the least, and its bounds, the earliest of such.

    Args:
        sums: of the costs of the layers before each.
        joined: what the stages before are worth, and the cost of a stage -> what they are worth together.
    """
    best: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {(0, 0): (0.0, (0,))}  # by stages and layers before
    for stage in range(1, stages + 1):
        for end in range(stage, len(sums) - (stages - stage)):
            starts = (start for start in range(stage - 1, end) if (stage - 1, start) in best)
            before = ((*best[stage - 1, start], sums[end] - sums[start]) for start in starts)
            best[stage, end] = min((joined(value, cost), (*bounds, end)) for value, bounds, cost in before)
    return best[stages, len(sums) - 1]
