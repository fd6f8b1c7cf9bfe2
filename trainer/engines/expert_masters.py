"""ZeRO 1 and 2 of experts that not all ranks have.

DeepSpeed knows one group of ranks with the same weights, and would overwrite what it takes for a copy; it is not shown these
experts (`hidden_from`). Their gradients are summed in float32 as those of a pipeline are, their float32 masters are cut for the
ranks that have the same experts, and the updated weights gathered from these.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.parallel.mesh import Mesh
from model.parameters import stacked_experts
from trainer.engines.deepspeed_internals import MasterSlice, flat_slices
from trainer.engines.gradient_sums import GradientSums, PartSums, WholeSums
from trainer.optimizers.fragments import Fragment, fragment_of


def stacks_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """The stacks of experts by name."""
    return {name: p for name, p in model.named_parameters() if stacked_experts(p) is not None}


@contextmanager
def hidden_from(model: nn.Module, hidden: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """The model without these parameters, for a library that would take them for its own."""
    owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in hidden}
    before = {name: dict(owner._parameters) for name, owner in owners.items()}
    try:
        for name, owner in owners.items():
            owner._parameters.pop(name.rpartition(".")[2], None)
        yield
    finally:
        for name, owner in owners.items():
            owner._parameters.clear()
            owner._parameters.update(before[name])


class ExpertMasters:
    """Masters, gradients and weights of a rank's experts.

    Args:
        model: whose stacks of experts become views of one flat tensor.
        stages: the stage of every parameter, where gradients are averaged micro-batch by micro-batch and only this rank's part
            of their sum is kept (ZeRO 2); None: the whole sum is kept and averaged once (ZeRO 1).
        limit: elements that are sent in one collective.
    """

    def __init__(self, model: nn.Module, mesh: Mesh, stages: Mapping[nn.Parameter, int] | None, limit: int):
        self._ranks, self._mesh = mesh.expert_replicas, mesh
        stacks = stacks_of(model)
        parameters = [*stacks.values()]
        positions, total = dict[nn.Parameter, int](), 0
        for parameter in parameters:
            positions[parameter], total = total, total + parameter.numel()
        part = -(-total // self._ranks.size)
        self._weights = torch.zeros(part * self._ranks.size, dtype=parameters[0].dtype, device=mesh.device)
        for parameter, start in positions.items():
            own = self._weights[start : start + parameter.numel()].view_as(parameter)
            own.copy_(parameter.data)
            parameter.data = own
        wide = torch.promote_types(self._weights.dtype, torch.float32)
        self._masters = self._own_weights().to(wide, copy=True)
        several = stages is not None and self._ranks.size > 1
        where = (positions, part, self._ranks, limit, mesh.device)
        own_stages = {parameter: (stages or {}).get(parameter, 0) for parameter in parameters}
        self.sums: GradientSums = PartSums(own_stages, *where) if several else WholeSums(*where)
        slices = flat_slices(parameters, [*positions.values()], self._masters, self._ranks.rank)
        names = {id(parameter): name for name, parameter in stacks.items()}
        named = [own for part in slices for own in part.by_tensor(names[id(part.parameter)])]
        self.slices: list[MasterSlice] = [own for _, own in named]
        self.fragments: list[Fragment] = [
            fragment_of(tensor.name, tensor.spec, mesh, own.offset, own.of(own.flat)) for tensor, own in named
        ]

    def mean(self) -> Tensor:
        """This rank's part of the gradients of the loss, flat: the sum over the ranks with the same experts of what the tokens
        of the others have added too, over the number of all."""
        return self.sums.mean().div_(self._mesh.experts.size)

    @torch.no_grad()
    def share(self) -> None:
        """Round the masters into the weights, and gather these. All ranks call it."""
        own = self._own_weights()
        own.copy_(self._masters)
        if self._ranks.group is not None:
            dist.all_gather_into_tensor(self._weights, own.clone(), group=self._ranks.group)

    def _own_weights(self) -> Tensor:
        return self._weights.view(self._ranks.size, -1)[self._ranks.rank]
