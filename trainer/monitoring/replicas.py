"""Checks that ranks which share a parameter hold the same bits of it, which a memory fault or a wrong collective changes."""

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.parallel.mesh import Axis, Mesh
from model.parameters import stacked_experts

CHUNK = 1 << 22
"""Elements checksummed at once: bounds the int64 copies to 32 MiB each."""


def replica_divergence(model: Any, mesh: Mesh) -> str | None:
    """Compare the bits of every parameter that ranks share; all ranks must call it, and all get the same answer.

    Replicas share every parameter (under ZeRO 3, where each holds a part, there is nothing to compare);
    tensor-parallel ranks share those that are not split, and the first and the last stage of a pipeline share a tied embedding.
    Cost: one pass over the weights and at most four small all-reduces.

    Returns:
        One sentence with the parameter and the ranks, or None when all agree.
    """
    parameters = [(_shown(name, parameter), parameter) for name, parameter in model.named_parameters() if parameter.numel()]
    if mesh.world.size == 1 or not parameters:
        return None
    sums_P = torch.stack([checksum(parameter.data) for _, parameter in parameters])
    whole_P = torch.tensor([_split(parameter) is None for _, parameter in parameters], device=sums_P.device)
    differs_P = _differs(sums_P, mesh.replicas) | (_differs(sums_P, mesh.tensor) & whole_P)
    if mesh.experts.size > 1:
        stack_P = torch.tensor([stacked_experts(parameter) is not None for _, parameter in parameters], device=sums_P.device)
        differs_P = torch.where(stack_P, _differs(sums_P, mesh.expert_replicas), differs_P)
    if mesh.ends.size > 1 and model.config.tie_word_embeddings:
        tied = [name for name, _ in parameters].index("model.embed_tokens.weight")
        differs_P[tied] |= _differs(sums_P[tied : tied + 1], mesh.ends)[0]
    if not mesh.world.max(differs_P.any().to(torch.int64)):
        return None
    rows = zip(parameters, sums_P.tolist(), whole_P.tolist(), differs_P.tolist(), strict=True)
    held = [None] * mesh.world.size  # by name: ranks need not have the same parameters
    dist.all_gather_object(held, {name: row for (name, _), *row in rows}, group=mesh.world.group)
    return _sentence(held, mesh.tensor.size)


def _shown(name: str, parameter: nn.Parameter) -> str:
    """Of a stack, with the experts that it holds: other ranks have other ones under the same name."""
    experts = stacked_experts(parameter)
    return name if experts is None else f"{name} (experts {experts.start} to {experts.stop - 1})"


def checksum(tensor: Tensor) -> Tensor:
    """A 0-dim int64 of the tensor's bits; it depends on the order, so that a permutation shows too."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    flat = tensor.detach().reshape(-1).view(bits)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, flat.numel(), CHUNK):
        part = flat[start : start + CHUNK].to(torch.int64)
        index = torch.arange(start, start + part.numel(), device=tensor.device)
        total += (part * (2 * index + 1)).sum()  # odd factors: no single bit can vanish modulo 2**64
    return total


def _split(parameter: nn.Parameter) -> int | None:
    return parameter.spec.split  # type: ignore[attr-defined]


def _differs(sums_P: Tensor, axis: Axis) -> Tensor:
    extremes_2P = axis.max(torch.stack([sums_P, ~sums_P]))  # ~x reverses the order of int64, so one MAX gives both ends
    return extremes_2P[0] != ~extremes_2P[1]


def _sentence(held: list[Any], tensor_parallel_size: int) -> str:
    """Name the first parameter that differs and the ranks outside the largest group that agrees (ties: the group with the
    lowest rank is believed).

    Args:
        held: by rank and name: checksum, whether tensor-parallel ranks share the parameter, whether it differs.
    """
    differing = {name for rows in held for name, row in rows.items() if row[2]}
    name = next(name for rows in held for name in rows if name in differing)
    lanes: dict[int, dict[int, int]] = {}  # checksum by rank, of the ranks that should agree
    for rank, rows in enumerate(held):
        if name in rows:
            total, whole, _ = rows[name]
            lanes.setdefault(0 if whole else rank % tensor_parallel_size, {})[rank] = total
    odd: list[int] = []
    for sums in lanes.values():
        believed = Counter(sums.values()).most_common(1)[0][0]
        odd.extend(rank for rank, total in sums.items() if total != believed)
    ranks = f"rank {odd[0]} differs" if len(odd) == 1 else f"ranks {', '.join(map(str, sorted(odd)))} differ"
    more = len(differing) - 1
    others = f" ({more} more parameter{'s' if more > 1 else ''} too)" if more else ""
    return (
        f"replicas of {name} are no longer equal: {ranks} from the others{others}; "
        "resume from a checkpoint before this step and check that computer's memory"
    )
