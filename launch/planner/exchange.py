"""What an update with whole matrices costs (UpdateRule.whole): who computes which matrix, operations, and parts that are sent.

All follows from the layout alone, by the functions with which the ranks of a run decide it (trainer/optimizers/whole.py).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil, prod

import numpy as np
import torch

from launch.config import RunConfig
from launch.planner.pipeline import Portion, owned_elements
from launch.planner.rules import rules_under, settings_of
from model.config import ModelConfig
from model.parameters import ParameterSpec, local_slice
from model.sizes import parameter_specs
from trainer.optimizers.whole import OwnedMatrix, Piece, choose_owners, exchange_rounds, pieces_of

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
    group: int | None = None
    """Where ranks split experts: which of them has this one; `before` counts its experts only. None: all ranks have it."""


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
    largest_piece: int
    """Elements of the largest part of a matrix that a rank has."""
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
    config: RunConfig, stage: int, ranks: tuple[int, int], portion: Portion, expert_parallel_size: int = 1
) -> WholeUpdate | None:  # fmt: skip
    """What the whole matrices of an update cost the ranks with the same layers; None if no rule needs any.

    Args:
        stage: of ZeRO; 0 = fold.
        ranks: tensor-parallel ones, and those with the same weights: data-parallel x context-parallel.
        portion: the layers of these ranks.
        expert_parallel_size: ranks that split the experts.
    """
    limit = config.parallel.reduce_bucket_elements
    settings, stage = settings_of(config), 1 if stage == 2 else stage  # both cut alike
    return _plan_whole(config.model, settings, stage, ranks, portion, expert_parallel_size, limit)


@lru_cache(maxsize=16)
def _any_whole(model: ModelConfig, settings: str) -> bool:
    return any(choice.rule.whole for choice in rules_under(model, settings).values())


@lru_cache(maxsize=512)
def _plan_whole(
    model: ModelConfig, settings: str, stage: int, ranks: tuple[int, int], portion: Portion, experts: int, limit: int
) -> WholeUpdate | None:  # fmt: skip
    rules = rules_under(model, settings)
    if not _any_whole(model, settings):
        return None
    elements, specs = owned_elements(model, ranks[0], portion), parameter_specs(model, ranks[0])
    own, names, members, filled = model.n_routed_experts // experts, list[str](), list[Member](), Counter[int | None]()
    flops: dict[tuple[object, ...], float] = {}
    for name, size in elements.items():
        spec, rule, group = specs[name], rules[name].rule, None
        if experts > 1 and spec.part == "experts":
            group = int(name.split(".")[-3]) // own
        if rule.whole:
            itemsize, key = rule.whole_dtype(torch.float32).itemsize, (id(rule), *spec.shape)
            if key not in flops:
                flops[key] = rule.whole_flops(*spec.shape)
            members.append(Member(str(len(names)), spec, filled[group], flops[key], itemsize, group))
            names.append(name)
        filled[group] += size
    if not members:
        return None
    update = _planned(tuple(members), tuple(filled.items()), stage, (*ranks, experts), limit)
    pairs = zip(names, update.matrices, strict=True)
    return replace(update, matrices=tuple(OwnedMatrix(name, matrix.pieces, matrix.owner) for name, matrix in pairs))


@lru_cache(maxsize=64)
def _planned(
    members: tuple[Member, ...],
    elements_by_group: tuple[tuple[int | None, int], ...],
    stage: int,
    ranks: tuple[int, int, int],
    limit: int,
) -> WholeUpdate:
    """The update of these matrices, which are numbered: most ranks of a pipeline have the same under other names.

    Args:
        elements_by_group: of all parameters on a tensor-parallel rank, apart for each group of experts.
        stage: of ZeRO; 0 = fold.
        ranks: tensor-parallel, with the same weights, and that split experts.
    """
    elements = dict(elements_by_group)
    pieces = _all_pieces(members, elements, stage, ranks)
    matrices = choose_owners(pieces, {member.name: member.flops for member in members})
    rounds, world = exchange_rounds(matrices, limit), ranks[0] * ranks[1]
    load, itemsize = [0.0] * world, {member.name: member.itemsize for member in members}
    for matrix, member in zip(matrices, members, strict=True):
        load[matrix.owner] += member.flops
    sizes = {id(own): sum(piece.length for piece in own) for own in pieces.values()}
    at_once, alone, portions = Counter[tuple[int, int]](), Counter[int](), Counter[tuple[int, int]]()
    for index, together in enumerate(rounds):
        for matrix in together:
            at_once[index, matrix.owner] += sizes[id(matrix.pieces)]
    batch = max(at_once.values(), default=0)
    for matrix in (matrix for matrix in matrices if matrix.alone):
        size = sizes[id(matrix.pieces)]
        portions[matrix.owner, alone[matrix.owner] % (len(rounds) + 1)] += size
        alone[matrix.owner] += 1
        batch = max(batch, size)
    batch = max(batch, min(limit, max(portions.values(), default=0)))
    distinct = {id(own): own for own in pieces.values()}.values()
    return WholeUpdate(
        tuple(matrices), len(rounds), sum(load), tuple(load), *_sent(rounds, itemsize, world),
        batch, max(piece.length for own in distinct for piece in own), max(itemsize.values()),
    )  # fmt: skip


def _all_pieces(
    members: Sequence[Member], elements: Mapping[int | None, int], stage: int, ranks: tuple[int, int, int]
) -> dict[str, tuple[Piece, ...]]:  # fmt: skip
    """The pieces of every matrix by name; those of one shape that lie on the same ranks share theirs."""
    made: dict[tuple[object, ...], tuple[Piece, ...]] = {}
    found: dict[str, tuple[Piece, ...]] = {}
    holders = {group: ranks[1] // (1 if group is None else ranks[2]) for group in elements}
    shares = {group: _share(elements[group], count) for group, count in holders.items()}
    for member in members:
        where, share = 0, shares[member.group]
        if stage in (1, 2):  # of a matrix that no border cuts, which part it lies in; of another, where it begins
            size = prod(_local_shape(member.spec, ranks[0]))
            place = member.before // share
            where = place if member.before + size <= (place + 1) * share else -1 - member.before
        key = (member.spec.shape, member.spec.split, member.group, where)
        if key not in made:
            made[key] = pieces_of(held_parts(member, elements[member.group], stage, *ranks).items())
        found[member.name] = made[key]
    return found


def _share(elements: int, ranks: int) -> int:
    """Elements that each of so many ranks has of what ZeRO 1 and 2 cut for them."""
    return ceil(elements / (PARTITION_ALIGNMENT * ranks)) * PARTITION_ALIGNMENT


@lru_cache(maxsize=4096)
def _local_shape(spec: ParameterSpec, tensor: int) -> Sequence[int]:
    """Of a tensor-parallel rank's slice."""
    return local_slice(spec, tensor, 0)[0]


def held_parts(
    member: Member, elements: int, stage: int, tensor: int, replicas: int, experts: int = 1
) -> dict[int, tuple[int, int, int]]:  # fmt: skip
    """Of each rank that has a part of a matrix: slice, offset and length of it, as the engines cut it.

    ZeRO 1 and 2 cut the concatenated parameters of a tensor-parallel rank, stage 3 each by itself; under fold nobody cuts.

    Args:
        elements: of all parameters that are cut together on a tensor-parallel rank.
        stage: of ZeRO; 0 = fold.
        tensor: tensor-parallel ranks, which are neighbours.
        replicas: ranks with the same weights.
        experts: of these, neighbours that split experts.
    """
    size = prod(_local_shape(member.spec, tensor))
    holders = range(replicas) if member.group is None else range(member.group, replicas, experts)
    if stage == 3:
        begin, share = 0, ceil(size / replicas)
    else:
        begin, share = member.before, _share(elements, len(holders))
    held: dict[int, tuple[int, int, int]] = {}
    first, last = (0, len(holders)) if stage == 0 else (begin // share, min(len(holders), (begin + size - 1) // share + 1))
    for place in range(first, last):
        start, stop = (min(max(end - begin, 0), size) for end in (place * share, (place + 1) * share))
        if stage == 0:
            start, stop = 0, size
        for index in range(tensor):
            rank = holders[place] * tensor + index
            held[rank] = (0 if member.spec.split is None else index, start, stop - start)
    return held


def _sent(rounds: Sequence[Sequence[OwnedMatrix]], itemsize: dict[str, int], world: int) -> tuple[Sent, Sent]:
    """What goes to owners and what comes back: the parts of a round for one rank travel in one message."""
    sizes, counts = np.zeros((2, world), np.int64), np.zeros((2, world), np.int64)
    parts: dict[int, _Parts] = {}
    for together in rounds:
        coming, leaving = dict[int, np.ndarray](), dict[int, np.ndarray]()
        alike = Counter[tuple[int, int]]()  # matrices with the same owner and pieces: bytes of an element of each
        for matrix in together:
            key = id(matrix.pieces)
            alike[matrix.owner, key] += itemsize[matrix.name]
            if key not in parts:
                parts[key] = _Parts(matrix.pieces, world)
        for (owner, key), each in alike.items():
            to_owner, back = parts[key].moved(owner)
            coming[owner] = coming.get(owner, 0) + each * to_owner
            leaving[owner] = leaving.get(owner, 0) + each * back
        for owner in coming:
            sizes[0] += coming[owner]
            counts[0] += coming[owner] > 0
            sizes[1, owner] += leaving[owner].sum()
            counts[1, owner] += np.count_nonzero(leaving[owner])
    to_owners, directions = (Sent(tuple(sizes[way].tolist()), tuple(counts[way].tolist())) for way in (0, 1))
    return to_owners, directions


class _Parts:
    """What ranks hold of a matrix, in elements."""

    def __init__(self, pieces: Sequence[Piece], world: int):
        self._held, self._only = np.zeros(world, np.int64), np.zeros(world, np.int64)
        self._shared: list[tuple[int, np.ndarray]] = []
        for piece in pieces:
            holders = np.array(piece.holders)
            self._held[holders] += piece.length
            if len(holders) == 1:
                self._only[holders] += piece.length
            else:
                self._shared.append((piece.length, holders))

    def moved(self, owner: int) -> tuple[np.ndarray, np.ndarray]:
        """Elements that each rank sends to an owner, as OwnedMatrix.sources, and that each gets back, as `receivers`."""
        to_owner, back = self._only.copy(), self._held.copy()
        to_owner[owner] = back[owner] = 0
        for length, holders in self._shared:
            away = np.abs(holders - owner)
            nearest = away.argmin()
            if away[nearest]:
                to_owner[holders[nearest]] += length
        return to_owner, back
