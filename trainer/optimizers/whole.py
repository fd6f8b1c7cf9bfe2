"""Directions of whole matrices where ranks hold parts of them: one rank collects a matrix, computes, and sends the parts back.

ZeRO 1 and 2 cut a few matrices at the borders of the ranks' partitions, ZeRO 3 cuts all, tensor parallelism slices them, and
under fold every replica has all. All of these are the same here: each matrix consists of pieces, each with its holders, and
one of these, its owner, computes it. Where the pieces lie is read off the fragments themselves when a run starts.

The ranks exchange in rounds, in the same order on all of them: while the pieces of one round travel, the matrices of the round
before and those that are nobody else's are computed.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapreplace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.parallel.mesh import Axis, Mesh
from trainer.optimizers.fragments import Fragment
from trainer.optimizers.rule import UpdateRule

Rule = Callable[[Fragment], UpdateRule]


@dataclass(frozen=True)
class Piece:
    """A contiguous part of one tensor-parallel slice of a matrix."""

    slice: int
    """Which; 0 where every tensor-parallel rank has the whole matrix."""
    offset: int
    """Of its first element in the flattened slice."""
    length: int
    holders: tuple[int, ...]
    """Ranks, ascending."""


@dataclass(frozen=True)
class OwnedMatrix:
    """A matrix and the rank that computes it."""

    name: str
    pieces: tuple[Piece, ...]
    """In the order of slices and offsets: together they are the matrix."""
    owner: int

    @property
    def elements(self) -> int:
        """Of the whole matrix."""
        return sum(piece.length for piece in self.pieces)

    @property
    def alone(self) -> bool:
        """Nobody but the owner holds anything of it."""
        return all(piece.holders == (self.owner,) for piece in self.pieces)

    def sources(self) -> Iterator[tuple[Piece, int]]:
        """Every piece that the owner lacks, and the rank that sends it: the nearest, which is of the owner's node."""
        for piece in self.pieces:
            if self.owner not in piece.holders:
                yield piece, min(piece.holders, key=lambda rank: abs(rank - self.owner))

    def receivers(self) -> Iterator[tuple[Piece, int]]:
        """Every piece of the direction, and a rank that waits for it."""
        for piece in self.pieces:
            for rank in piece.holders:
                if rank != self.owner:
                    yield piece, rank


def pieces_of(held: Iterable[tuple[int, Sequence[int]]]) -> tuple[Piece, ...]:
    """The pieces of one matrix.

    Args:
        held: ranks, ascending, each with slice, offset and length of its part; one may be empty.
    """
    holders: dict[tuple[int, int, int], list[int]] = {}
    for rank, (index, offset, length) in held:
        if length:
            holders.setdefault((index, offset, length), []).append(rank)
    return tuple(Piece(*place, tuple(ranks)) for place, ranks in sorted(holders.items()))


def choose_owners(pieces: Mapping[str, tuple[Piece, ...]], costs: Mapping[str, float]) -> list[OwnedMatrix]:
    """An owner for each matrix, in the order given, the costliest chosen first: the holder of the largest part, so that little
    is sent, among those who do not make the update longer by it; among equals the one with least to do. Alike on all ranks."""
    load: dict[int, float] = {}
    most = 0.0
    owners: dict[str, int] = {}
    order = {name: index for index, name in enumerate(pieces)}
    holders = {id(own): _Holders(own) for own in pieces.values()}  # matrices that are cut alike may share their pieces
    held = {name: holders[id(own)] for name, own in pieces.items()}
    for name in sorted(order, key=lambda name: (held[name].several, -costs[name], order[name])):
        idle = [(-size, was + costs[name], rank) for size, was, rank in held[name].idlest(load)]
        longest = max(min(then for _, then, _ in idle), most)
        _, then, owner = min(each for each in idle if each[1] <= longest)
        owners[name], load[owner], most = owner, then, max(most, then)
    return [OwnedMatrix(name, pieces[name], owners[name]) for name in order]


class _Holders:
    """The ranks that hold a matrix, those with parts of one size in a heap with the idlest first."""

    def __init__(self, pieces: Sequence[Piece]):
        held = _held(pieces)
        self.several = len(held) > 1
        self._heaps = defaultdict[int, list[tuple[float, int]]](list)
        for rank in sorted(held):
            self._heaps[held[rank]].append((0.0, rank))  # ascending: a heap

    def idlest(self, load: Mapping[int, float]) -> Iterator[tuple[int, float, int]]:
        """Of each size: the size, and the least that a rank with such a part has to do, and which. Loads only grow, so what a
        heap has of them may be too small and is put right where it counts."""
        for size, heap in self._heaps.items():
            while (now := load.get(heap[0][1], 0.0)) != heap[0][0]:
                heapreplace(heap, (now, heap[0][1]))
            yield size, *heap[0]


def _held(pieces: Sequence[Piece]) -> dict[int, int]:
    """Elements of a matrix by the rank that holds them."""
    held: dict[int, int] = {}
    for piece in pieces:
        for rank in piece.holders:
            held[rank] = held.get(rank, 0) + piece.length
    return held


def exchange_rounds(matrices: Sequence[OwnedMatrix], limit: int) -> list[list[OwnedMatrix]]:
    """The matrices of which pieces are sent, in rounds: in each a rank computes at most `limit` elements, or one matrix."""
    rounds: list[list[OwnedMatrix]] = []
    filled: dict[int, tuple[int, int]] = {}
    sizes: dict[int, int] = {}  # of pieces that many matrices share, once
    for matrix in matrices:
        if matrix.alone:
            continue
        index, elements = filled.get(matrix.owner, (0, 0))
        if (key := id(matrix.pieces)) not in sizes:
            sizes[key] = matrix.elements
        size = sizes[key]
        if elements and elements + size > limit:
            index, elements = index + 1, 0
        filled[matrix.owner] = (index, elements + size)
        while len(rounds) <= index:
            rounds.append([])
        rounds[index].append(matrix)
    return rounds


class WholeMatrices:
    """The directions of this rank's parts of all matrices whose rule has `whole`.

    All ranks with the same layers make it and call it alike, and exchange among themselves.

    Args:
        fragments: what this rank holds of each such matrix; one may be empty. Ranks with the same experts have the same, in the
            same order.
        rule: of a fragment.
        limit: elements of the matrices that a rank computes in a round.
    """

    def __init__(self, fragments: Sequence[Fragment], rule: Rule, mesh: Mesh, limit: int):
        self.rule, self.ranks, self.device, self.limit = rule, mesh.stage, mesh.device, limit
        self.fragments = {fragment.name: fragment for fragment in fragments}
        flops = _of_all({f.name: rule(f).whole_flops(*f.shape) for f in fragments}, mesh)
        self.matrices = choose_owners(_all_pieces([*flops], self.fragments, mesh), flops)
        self.alone = [matrix for matrix in self.matrices if matrix.alone and matrix.owner == self.ranks.rank]
        self.rounds = exchange_rounds(self.matrices, limit)

    def directions(self, collected: Callable[[Fragment], Tensor]) -> Iterator[tuple[Fragment, Tensor]]:
        """This rank's parts of the directions, flat, not yet multiplied by `whole_scale`; each as soon as it is known.

        Args:
            collected: what `direction` gives for a fragment, flat; asked for once per fragment that is not empty.
        """
        count = len(self.rounds)
        portions = [self.alone[index :: count + 1] for index in range(count + 1)]
        coming: _Arriving = self._collect(self.rounds[0], collected) if count else dict
        leaving: _Arriving = dict
        for index, matrices in enumerate(self.rounds):
            arrived = coming
            coming = self._collect(self.rounds[index + 1], collected) if index + 1 < count else dict
            yield from self._alone(portions[index], collected)
            done = self._computed(arrived())
            returning = self._send_back(matrices, done)
            yield from self._own_parts(done)
            yield from self._named(leaving())
            leaving = returning
        yield from self._alone(portions[count], collected)
        yield from self._named(leaving())

    def collected(self, part: Callable[[Fragment], Tensor]) -> Iterator[tuple[Fragment, Tensor]]:
        """The whole matrices [rows, columns] that this rank owns, one by one; nothing is sent back.

        Args:
            part: what this rank has of a matrix, flat; asked for once per fragment that is not empty.
        """
        for matrix in self.alone:
            fragment = self.fragments[matrix.name]
            yield fragment, _joined(fragment, self._part(fragment, part))
        for matrices in self.rounds:
            for name, flat in self._collect(matrices, part)().items():
                yield self.fragments[name], _joined(self.fragments[name], flat)

    def _collect(self, matrices: Sequence[OwnedMatrix], collected: Callable[[Fragment], Tensor]) -> "_Arriving":
        """Send what this rank has of the matrices of a round to their owners; what it owns, once the pieces have arrived."""
        rank, whole = self.ranks.rank, dict[str, Tensor]()
        sends, targets = defaultdict[int, list[Tensor]](list), defaultdict[int, list[Tensor]](list)
        for matrix in matrices:
            if matrix.owner == rank:
                fragment = self.fragments[matrix.name]
                part = self._part(fragment, collected)
                flat = whole[matrix.name] = part.new_empty(matrix.elements)
                self._own(fragment, flat).copy_(part)
                for piece, source in matrix.sources():
                    targets[source].append(_part_of(fragment, flat, piece.slice, piece.offset, piece.length))
            elif any(source == rank for _, source in matrix.sources()):
                sends[matrix.owner].append(self._part(self.fragments[matrix.name], collected))
        return _begin(self.ranks, sends, targets, whole)

    def _send_back(self, matrices: Sequence[OwnedMatrix], done: Mapping[str, Tensor]) -> "_Arriving":
        """Send the directions that this rank has computed in a round; its parts of the others', once they have arrived."""
        rank, parts = self.ranks.rank, dict[str, Tensor]()
        sends, targets = defaultdict[int, list[Tensor]](list), defaultdict[int, list[Tensor]](list)
        for matrix in matrices:
            fragment = self.fragments.get(matrix.name)
            if fragment is None:
                continue
            if matrix.owner == rank:
                for piece, receiver in matrix.receivers():
                    sends[receiver].append(_part_of(fragment, done[matrix.name], piece.slice, piece.offset, piece.length))
            elif length := fragment.values.numel():
                part = parts[matrix.name] = torch.empty(length, dtype=self._dtype(fragment), device=self.device)
                targets[matrix.owner].append(part)
        return _begin(self.ranks, sends, targets, parts)

    def _alone(
        self, matrices: Sequence[OwnedMatrix], collected: Callable[[Fragment], Tensor]
    ) -> Iterator[tuple[Fragment, Tensor]]:
        """Directions of matrices that this rank has whole and nobody else, those of one shape next to each other."""
        batch, elements = dict[str, Tensor](), 0
        for matrix in sorted(matrices, key=lambda matrix: self.fragments[matrix.name].shape):
            if batch and elements + matrix.elements > self.limit:
                yield from self._own_parts(self._computed(batch))
                batch, elements = {}, 0
            batch[matrix.name] = self._part(self.fragments[matrix.name], collected)
            elements += matrix.elements
        yield from self._own_parts(self._computed(batch))

    def _computed(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Directions of whole matrices, flat as their pieces lie; those of one shape and rule are computed together."""
        alike: dict[tuple[UpdateRule, tuple[int, ...]], list[str]] = {}
        for name in whole:
            fragment = self.fragments[name]
            alike.setdefault((self.rule(fragment), fragment.shape), []).append(name)
        done: dict[str, Tensor] = {}
        for (rule, shape), names in alike.items():
            together = max(1, self.limit // math.prod(shape))
            for start in range(0, len(names), together):
                batch = names[start : start + together]
                stacked = torch.stack([_joined(self.fragments[name], whole[name]) for name in batch])
                for name, direction in zip(batch, rule.whole_directions(stacked).unbind(), strict=True):
                    done[name] = _sliced(self.fragments[name], direction)
        return done

    def _part(self, fragment: Fragment, collected: Callable[[Fragment], Tensor]) -> Tensor:
        return collected(fragment).to(self.device, self._dtype(fragment))

    def _dtype(self, fragment: Fragment) -> torch.dtype:
        return self.rule(fragment).whole_dtype(torch.promote_types(fragment.values.dtype, torch.float32))

    def _own(self, fragment: Fragment, flat: Tensor) -> Tensor:
        """This rank's part of a whole matrix."""
        return _part_of(fragment, flat, _slice_index(fragment), fragment.offset, fragment.values.numel())

    def _own_parts(self, done: Mapping[str, Tensor]) -> Iterator[tuple[Fragment, Tensor]]:
        return ((self.fragments[name], self._own(self.fragments[name], flat)) for name, flat in done.items())

    def _named(self, parts: Mapping[str, Tensor]) -> Iterator[tuple[Fragment, Tensor]]:
        return ((self.fragments[name], part) for name, part in parts.items())


_Arriving = Callable[[], dict[str, Tensor]]
"""Waits for what other ranks send, and gives it."""


def _begin(
    ranks: Axis, sends: Mapping[int, list[Tensor]], targets: Mapping[int, list[Tensor]], filled: dict[str, Tensor]
) -> _Arriving:
    """Exchange flat tensors with other ranks, those of two ranks in one message; `filled` once the targets are."""
    operations: list[dist.P2POp] = []
    messages: dict[tuple[int, ...], Tensor] = {}  # of what several ranks are sent, one copy
    landing: list[tuple[Tensor, list[Tensor]]] = []
    for peer in sorted({*sends, *targets}):
        if own := sends.get(peer):
            key = tuple(part.data_ptr() for part in own)
            if key not in messages:
                messages[key] = torch.cat([part.view(torch.uint8) for part in own])
            operations.append(dist.P2POp(dist.isend, messages[key], group=ranks.group, group_peer=peer))
        if parts := targets.get(peer):
            message = torch.empty(sum(part.nbytes for part in parts), dtype=torch.uint8, device=parts[0].device)
            landing.append((message, parts))
            operations.append(dist.P2POp(dist.irecv, message, group=ranks.group, group_peer=peer))
    works: list[Any] = dist.batch_isend_irecv(operations) if operations else []

    def arrived() -> dict[str, Tensor]:
        for work in works:
            work.wait()
        for message, parts in landing:
            for part, bytes_ in zip(parts, message.split([part.nbytes for part in parts]), strict=True):
                part.view(torch.uint8).copy_(bytes_)
        messages.clear()
        return filled

    return arrived


def _of_all(costs: dict[str, float], mesh: Mesh) -> dict[str, float]:
    """The matrices of all ranks with the same layers, which have different ones where they have different experts."""
    if mesh.experts.size == 1:
        return costs
    gathered: list[Any] = [None] * mesh.stage.size
    dist.all_gather_object(gathered, costs, group=mesh.stage.group)
    return {name: cost for one in gathered for name, cost in one.items()}


def _all_pieces(names: Sequence[str], fragments: Mapping[str, Fragment], mesh: Mesh) -> dict[str, tuple[Piece, ...]]:
    """What the ranks with the same layers hold of each matrix."""
    held = torch.zeros(mesh.stage.size, len(names), 3, dtype=torch.int64, device=mesh.device)
    own = [fragments.get(name) for name in names]
    rows = [[0, 0, 0] if f is None else [_slice_index(f), f.offset, f.values.numel()] for f in own]
    held[mesh.stage.rank] = torch.tensor(rows, dtype=torch.int64).view(-1, 3)
    by_matrix = mesh.stage.sum(held).transpose(0, 1).tolist()
    return {name: pieces_of(enumerate(ranks)) for name, ranks in zip(names, by_matrix, strict=True)}


def _split(fragment: Fragment) -> int:
    """The dimension that tensor-parallel ranks split; 0 if none."""
    return 1 if fragment.slice_shape[1] != fragment.shape[1] else 0


def _slice_index(fragment: Fragment) -> int:
    split = _split(fragment)
    return fragment.slice_start[split] // fragment.slice_shape[split]


def _part_of(fragment: Fragment, flat: Tensor, index: int, offset: int, length: int) -> Tensor:
    """A part of slice `index` in a whole matrix whose flattened slices follow each other."""
    return flat.narrow(0, index * math.prod(fragment.slice_shape) + offset, length)


def _joined(fragment: Fragment, flat: Tensor) -> Tensor:
    """The matrix [rows, columns] of flattened slices that follow each other."""
    if not (split := _split(fragment)):
        return flat.view(fragment.shape)
    return torch.cat(flat.view(-1, *fragment.slice_shape).unbind(), dim=split)


def _sliced(fragment: Fragment, matrix: Tensor) -> Tensor:
    """The inverse of `_joined`."""
    if not (split := _split(fragment)):
        return matrix.reshape(-1)
    return torch.stack(matrix.split(fragment.slice_shape[split], dim=split)).view(-1)
