"""What each pipeline-parallel rank has of the network, and what its schedule makes it hold and wait for.

Counts follow from the orders of forwards and backwards of torch.distributed.pipelining's Schedule1F1B and
ScheduleInterleaved1F1B (`tests/launch/planner/test_pipeline.py` runs through them).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

from model.config import ModelConfig
from model.flops import stage_bounds
from model.parallel.pipeline import PipelineParallel
from model.sizes import elements_per_rank, parameter_specs


@dataclass(frozen=True)
class Portion:
    """What one pipeline-parallel rank has of the network."""

    stages: tuple[tuple[int, ...], ...]
    """Layers of each of its stages, the earliest first."""
    first: bool
    """It has the embedding."""
    last: bool
    """It has the final norm and the head."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Of all its stages."""
        return tuple(chain(*self.stages))


@lru_cache(maxsize=256)
def portions(model: ModelConfig, sequence_length: int, ranks: int, stages_per_rank: int) -> tuple[Portion, ...]:
    """What each rank has, by its place in the pipeline.

    Raises:
        ValueError: more stages than layers.
    """
    layers = model.num_hidden_layers
    bounds = stage_bounds(model, sequence_length, ranks * stages_per_rank) if ranks > 1 else (0, layers)
    seen = (PipelineParallel(ranks, rank, None, bounds) for rank in range(ranks))
    return tuple(
        Portion(tuple(tuple(rank.layers(stage, layers)) for stage in rank.own), rank.is_first, rank.is_last) for rank in seen
    )


@lru_cache(maxsize=1024)
def owned_elements(model: ModelConfig, tensor_parallel_size: int, portion: Portion) -> dict[str, int]:
    """Elements of every parameter of a rank by name, in the order of the network, without the copy of a tied embedding."""
    specs, layers = parameter_specs(model), {*portion.layers}

    def owned(name: str) -> bool:
        if name.startswith("model.layers."):
            return int(name.split(".")[2]) in layers
        return portion.first if specs[name].part == "embedding" else portion.last

    return {name: count for name, count in elements_per_rank(model, tensor_parallel_size).items() if owned(name)}


def stage_elements(model: ModelConfig, tensor_parallel_size: int, portion: Portion) -> list[list[int]]:
    """Elements of every parameter of each of a rank's stages, in the order of the network."""
    owned, found = owned_elements(model, tensor_parallel_size, portion), [list[int]() for _ in portion.stages]
    stage_of = {layer: stage for stage, layers in enumerate(portion.stages) for layer in layers}
    specs = parameter_specs(model)
    for name, count in owned.items():
        if name.startswith("model.layers."):
            found[stage_of[int(name.split(".")[2])]].append(count)
        else:
            found[0 if specs[name].part == "embedding" else -1].append(count)
    return found


def copied_elements(model: ModelConfig, tensor_parallel_size: int, portion: Portion) -> int:
    """Elements of the last rank's copy of a tied embedding; 0 on other ranks."""
    if not model.tie_word_embeddings or portion.first or not portion.last:
        return 0
    elements = elements_per_rank(model, tensor_parallel_size)
    return sum(elements[name] for name, spec in parameter_specs(model).items() if spec.part == "embedding")


@dataclass(frozen=True)
class Rounds:
    """The order of forwards and backwards: 1F1B, or interleaved where a rank has several stages."""

    ranks: int
    stages_per_rank: int
    micro_batches: int

    @property
    def bubble(self) -> float:
        """Time in which a rank has nothing to do, over that in which it computes, where all stages take as long (Narayanan et
        al. 2021, sections 2.2.1 and 2.2.2)."""
        return (self.ranks - 1) / (self.stages_per_rank * self.micro_batches)

    @property
    def idle_share(self) -> float:
        """The bubble's share of forward and backward."""
        return self.bubble / (1 + self.bubble)

    @property
    def together(self) -> int:
        """Interleaved: micro-batches that pass a stage of a rank before the rank turns to its next stage."""
        return self.micro_batches // max(1, self.micro_batches // self.ranks)

    def in_flight(self, rank: int) -> int:
        """Most forwards of a rank's stages, one stage each, whose backward is still to come."""
        if self.stages_per_rank == 1:
            return min(self.micro_batches, self.ranks - rank)
        before = (self.stages_per_rank - 1) * self.together + 2 * (self.ranks - 1 - rank)
        return min(self.stages_per_rank * self.micro_batches, before + 1)

    def most(self, rank: int, costs: Sequence[int], loss: int = 0) -> int:
        """Most that the forwards in flight on a rank cost together.

        Args:
            costs: of a forward of each of its stages, the earliest first.
            loss: what a forward of the last of them costs on top while it runs.
        """
        cost = largest = 0
        first, count = self.in_flight(rank), self.stages_per_rank * self.micro_batches
        for index in range(min(count, first + self.stages_per_rank * self.together)):
            stage = self._stage(index)
            cost += costs[stage]
            if index >= first:  # the stages' backwards come in the other order
                cost -= costs[-1 - self._stage(index - first)]
            largest = max(largest, cost + loss * (stage + 1 == self.stages_per_rank))
        return largest

    def _stage(self, index: int) -> int:
        """Which of its stages a rank passes in its forward of this number."""
        return index // self.together % self.stages_per_rank

    @property
    def waits(self) -> float:
        """Messages between stages that ranks wait for in an update, if they take little time beside a stage: with 1F1B there
        and back by a micro-batch of `ranks` and at both ends, interleaved at both ends only."""
        if self.ranks == 1:
            return 0.0
        if self.stages_per_rank == 1:
            return 2.0 * self.micro_batches * (self.ranks - 1) / self.ranks + 2 * (self.ranks - 2)
        return 2.0 * (self.ranks * (self.stages_per_rank if self.together == self.ranks else 1) - 1)
