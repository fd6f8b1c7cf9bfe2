"""What an update with whole matrices costs (UpdateRule.whole): who computes which matrix, operations, and parts that are sent.

All follows from the layout alone, by the functions with which the ranks of a run decide it (trainer/optimizers/whole.py).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, prod

import torch

from launch.config import RunConfig
from launch.planner.rules import assigned_rules
from model.parameters import ParameterSpec, local_slice
from model.sizes import parameter_specs
from trainer.optimizers.whole import OwnedMatrix, choose_owners, exchange_rounds, pieces_of

PARTITION_ALIGNMENT = 2
"""DeepSpeed pads each rank's partition of the flat weights to a multiple of so many elements in stages 1 and 2."""


@dataclass(frozen=True)
class Member:
    """A matrix that moves along a direction of the whole."""

    name: str
    spec: ParameterSpec
    before: int
    """Elements of the parameters before it on a tensor-parallel rank."""
    flops: float
    """Of its direction."""
    itemsize: int
    """Bytes per element in which it travels."""


@dataclass(frozen=True)
class Sent:
    """What all ranks send each other in one direction."""

    bytes_by_rank: tuple[int, ...]
    messages_by_rank: tuple[int, ...]

    @property
    def busiest(self) -> int:
        """The rank that sends most."""
        return max(range(len(self.bytes_by_rank)), key=self.bytes_by_rank.__getitem__)


@dataclass(frozen=True)
class WholeUpdate:
    """The directions of all whole matrices in one update, of the ranks with the same layers."""

    matrices: tuple[OwnedMatrix, ...]
    rounds: int
    flops: float
    """Of all ranks."""
    flops_by_rank: tuple[float, ...]
    to_owners: Sent
    back: Sent
    batch_elements: int
    """Of the matrices that a rank computes at once, at most."""
    itemsize: int
    """Bytes of an element on its way, at most."""

    @property
    def most_loaded_flops(self) -> float:
        """Of the rank that has most to compute."""
        return max(self.flops_by_rank)

    @property
    def imbalance(self) -> float:
        """Operations of the most loaded rank over the mean."""
        return self.most_loaded_flops * len(self.flops_by_rank) / self.flops

    @property
    def cut(self) -> list[OwnedMatrix]:
        """Matrices of which pieces must move to be computed."""
        return [matrix for matrix in self.matrices if any(True for _ in matrix.sources())]

    @property
    def moved_elements(self) -> int:
        """Elements that are sent to owners."""
        return sum(piece.length for matrix in self.matrices for piece, _ in matrix.sources())


def plan_whole(
    config: RunConfig, stage: int, tensor: int, replicas: int, elements: Mapping[str, int]
) -> WholeUpdate | None:  # fmt: skip
    """What the whole matrices of an update cost the ranks with the same layers; None if no rule needs any.

    Args:
        stage: of ZeRO; 0 = fold.
        tensor: tensor-parallel ranks.
        replicas: ranks with the same weights: data-parallel x context-parallel.
        elements: of each parameter that a tensor-parallel rank owns, by name, in the order of the network.
    """
    members, before, rules = list[Member](), 0, assigned_rules(config)
    specs = parameter_specs(config.model, tensor)
    for name in elements:
        spec, rule = specs[name], rules[name].rule
        if rule.whole:
            rows, columns = spec.shape
            itemsize = rule.whole_dtype(torch.float32).itemsize
            members.append(Member(name, spec, before, rule.whole_flops(rows, columns), itemsize))
        before += elements[name]
    if not members:
        return None
    return _planned(tuple(members), before, stage, (tensor, replicas), config.parallel.reduce_bucket_elements)


@lru_cache(maxsize=256)
def _planned(members: tuple[Member, ...], elements: int, stage: int, ranks: tuple[int, int], limit: int) -> WholeUpdate:
    """The update of these matrices.

    Args:
        elements: of all parameters on a tensor-parallel rank.
        stage: of ZeRO; 0 = fold.
        ranks: tensor-parallel, and with the same weights.
    """
    pieces = {member.name: pieces_of(held_parts(member, elements, stage, *ranks)) for member in members}
    matrices = choose_owners(pieces, {member.name: member.flops for member in members})
    rounds, world = exchange_rounds(matrices, limit), ranks[0] * ranks[1]
    load, itemsize = [0.0] * world, {member.name: member.itemsize for member in members}
    for matrix, member in zip(matrices, members, strict=True):
        load[matrix.owner] += member.flops
    at_once = Counter[tuple[int, int]]()
    for index, together in enumerate(rounds):
        for matrix in together:
            at_once[index, matrix.owner] += matrix.elements
    portions = Counter[tuple[int, int]]()
    batch = max(at_once.values(), default=0)
    for rank in range(world):
        own = [matrix.elements for matrix in matrices if matrix.alone and matrix.owner == rank]
        for index, size in enumerate(own):
            portions[rank, index % (len(rounds) + 1)] += size
            batch = max(batch, size)
    batch = max(batch, min(limit, max(portions.values(), default=0)))
    return WholeUpdate(
        tuple(matrices), len(rounds), sum(load), tuple(load), *_sent(rounds, itemsize, world),
        batch, max(itemsize.values()),
    )  # fmt: skip


def held_parts(member: Member, elements: int, stage: int, tensor: int, replicas: int) -> list[tuple[int, int, int]]:
    """Of each rank: slice, offset and length of its part of a matrix, as the engines cut it.

    ZeRO 1 and 2 cut the concatenated parameters of a tensor-parallel rank, stage 3 each by itself; under fold nobody cuts.

    Args:
        elements: of all parameters on a tensor-parallel rank.
        stage: of ZeRO; 0 = fold.
        tensor: tensor-parallel ranks, which are neighbours.
        replicas: ranks with the same weights.
    """
    size = prod(local_slice(member.spec, tensor, 0)[0])
    if stage == 3:
        begin, share = 0, ceil(size / replicas)
    else:
        begin, share = member.before, ceil(elements / (PARTITION_ALIGNMENT * replicas)) * PARTITION_ALIGNMENT
    held = []
    for rank in range(replicas):
        start, stop = (min(max(end - begin, 0), size) for end in (rank * share, (rank + 1) * share))
        if stage == 0:
            start, stop = 0, size
        place = (start, stop - start) if stop > start else (0, 0)
        held += [(0 if member.spec.split is None else index, *place) for index in range(tensor)]
    return held


def _sent(rounds: Sequence[Sequence[OwnedMatrix]], itemsize: dict[str, int], world: int) -> tuple[Sent, Sent]:
    """What goes to owners and what comes back: the parts of a round for one rank travel in one message."""
    both: list[Sent] = []
    for back in (False, True):
        messages = Counter[tuple[int, int, int]]()
        for index, together in enumerate(rounds):
            for matrix in together:
                for piece, rank in matrix.receivers() if back else matrix.sources():
                    ends = (matrix.owner, rank) if back else (rank, matrix.owner)
                    messages[index, *ends] += piece.length * itemsize[matrix.name]
        sizes, counts = [0] * world, [0] * world
        for (_, sender, _), size in messages.items():
            sizes[sender], counts[sender] = sizes[sender] + size, counts[sender] + 1
        both.append(Sent(tuple(sizes), tuple(counts)))
    return both[0], both[1]
