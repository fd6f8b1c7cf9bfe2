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
from model.sizes import elements_per_rank, parameter_specs, parameters_per_rank


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

    @property
    def keys(self) -> list[int | str]:
        """Of `elements_by_layer`."""
        first, last = ["first"] * self.first, ["last"] * self.last
        return [*first, *self.layers, *last]


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
def owned_elements(
    model: ModelConfig, tensor_parallel_size: int, portion: Portion, expert_parallel_size: int = 1
) -> dict[str, int]:  # fmt: skip
    """Elements of every tensor of a rank by name, as optimizers know them, in the order of the network, without the copy of a
    tied embedding; of ranks that split experts what the first has."""
    parts = elements_by_layer(model, tensor_parallel_size, False)
    owned = {name: count for key in portion.keys for name, count in parts.get(key, {}).items()}
    if expert_parallel_size == 1:
        return owned
    specs, own = parameter_specs(model), model.n_routed_experts // expert_parallel_size
    return {name: n for name, n in owned.items() if specs[name].part != "experts" or int(name.split(".")[-3]) < own}


@lru_cache(maxsize=1024)
def stored_elements(
    model: ModelConfig, tensor_parallel_size: int, portion: Portion, expert_parallel_size: int = 1
) -> tuple[dict[str, int], dict[str, int]]:  # fmt: skip
    """Elements of every parameter of a rank by name, as the network holds them, each stack of experts one parameter: those that
    all ranks with the same layers have, and the stacks of ranks that split experts; without the copy of a tied embedding."""
    parts = elements_by_layer(model, tensor_parallel_size, True)
    owned = {name: count for key in portion.keys for name, count in parts.get(key, {}).items()}
    if expert_parallel_size == 1:
        return owned, {}
    stacks = {name: count // expert_parallel_size for name, count in owned.items() if _is_stack(name)}
    return {name: count for name, count in owned.items() if name not in stacks}, stacks


def _is_stack(name: str) -> bool:
    return ".mlp.experts." in name


@lru_cache(maxsize=64)
def elements_by_layer(model: ModelConfig, tensor_parallel_size: int, stored: bool) -> dict[int | str, dict[str, int]]:
    """Elements on a rank by name, as the network holds them (`stored`) or as optimizers know them, apart for each layer, for
    "first" (the embedding) and for "last" (final norm and head)."""
    elements = (parameters_per_rank if stored else elements_per_rank)(model, tensor_parallel_size)
    specs, found = parameter_specs(model), dict[int | str, dict[str, int]]()
    for name, count in elements.items():
        if name.startswith("model.layers."):
            key: int | str = int(name.split(".", 3)[2])
        else:
            key = "first" if specs[name].part == "embedding" else "last"
        found.setdefault(key, {})[name] = count
    return found


@lru_cache(maxsize=1024)
def stage_elements(
    model: ModelConfig, tensor_parallel_size: int, portion: Portion, stored: bool = False, expert_parallel_size: int = 1
) -> list[list[int]]:  # fmt: skip
    """Elements of every tensor of each of a rank's stages, in the order of the network; `stored`: of every parameter, which all
    ranks with the same layers have."""
    if stored:
        owned, _ = stored_elements(model, tensor_parallel_size, portion, expert_parallel_size)
    else:
        owned = owned_elements(model, tensor_parallel_size, portion, expert_parallel_size)
    specs, found = parameter_specs(model), [list[int]() for _ in portion.stages]
    stage_of = {layer: stage for stage, layers in enumerate(portion.stages) for layer in layers}
    for name, count in owned.items():
        if name.startswith("model.layers."):
            found[stage_of[int(name.split(".", 3)[2])]].append(count)
        else:
            found[0 if specs[name].part == "embedding" else -1].append(count)
    return found


@lru_cache(maxsize=256)
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
        if self.stages_per_rank == 1:
            return self.in_flight(rank) * costs[0] + loss
        return _most_interleaved(self, self.in_flight(rank), tuple(costs), loss)

    @property
    def waits(self) -> float:
        """Messages between stages that ranks wait for in an update, if they take little time beside a stage: with 1F1B there
        and back by a micro-batch of `ranks` and at both ends, interleaved at both ends only."""
        if self.ranks == 1:
            return 0.0
        if self.stages_per_rank == 1:
            return 2.0 * self.micro_batches * (self.ranks - 1) / self.ranks + 2 * (self.ranks - 2)
        return 2.0 * (self.ranks * (self.stages_per_rank if self.together == self.ranks else 1) - 1)


@lru_cache(maxsize=4096)
def _most_interleaved(rounds: Rounds, first: int, costs: tuple[int, ...], loss: int) -> int:
    """As Rounds.most, of a rank with `first` forwards in flight at most."""
    cost = largest = 0
    together, stages = rounds.together, rounds.stages_per_rank
    for index in range(min(stages * rounds.micro_batches, first + stages * together)):
        stage = index // together % stages  # which of its stages the rank passes in this forward
        cost += costs[stage]
        if index >= first:  # the stages' backwards come in the other order
            cost -= costs[-1 - (index - first) // together % stages]
        largest = max(largest, cost + loss * (stage + 1 == stages))
    return largest
