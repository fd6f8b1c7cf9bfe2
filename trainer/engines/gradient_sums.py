"""Sums of gradients in float32 under a pipeline, which DeepSpeed's stages do not make: over the micro-batches of an update, and
then the mean over the ranks with the same weights.

A gradient is added as soon as the backward has made it, and freed. `WholeSums` keeps the sums of all of a rank's parameters
and averages them once per update (ZeRO 1). `PartSums` averages the gradients of every micro-batch and keeps the sums of this
rank's part (ZeRO 2).
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.parallel.mesh import Axis
from trainer.engines.buckets import Buckets


class GradientSums:
    """Sums in the order of a flat tensor, cut into equal parts for the ranks of an axis.

    Args:
        positions: first element of every parameter in the flat tensor.
        part: elements of a rank's part; together they may be longer than the parameters.
        limit: elements that are sent in one collective.
    """

    def __init__(self, positions: Mapping[nn.Parameter, int], part: int, axis: Axis, limit: int, device: torch.device):
        self.positions, self.part, self.axis, self.limit = positions, part, axis, limit
        self.device = device
        self._hooks = [parameter.register_post_accumulate_grad_hook(self._take) for parameter in positions]

    def begin(self) -> None:
        """An update begins: the sums are zero."""
        raise NotImplementedError

    def begin_backward(self, stage: int) -> None:
        """The backward of a micro-batch through a stage begins."""

    def add(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """Add a gradient that no backward here has made, such as that of a copy on another rank; all ranks of the axis do."""
        raise NotImplementedError

    def mean(self) -> Tensor:
        """This rank's part of the mean over the ranks, float32 and flat; valid until the next update begins."""
        raise NotImplementedError

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    def _take(self, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert isinstance(parameter, nn.Parameter) and gradient is not None
        self._made(parameter, gradient)

    def _made(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        raise NotImplementedError


class WholeSums(GradientSums):
    """The sums of all parameters."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self._flat = torch.zeros(self.axis.size * self.part, device=self.device)
        self._views = {p: self._flat[start : start + p.numel()].view_as(p) for p, start in self.positions.items()}

    def begin(self) -> None:
        self._flat.zero_()

    def add(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        self._views[parameter] += gradient

    _made = add

    def mean(self) -> Tensor:
        by_rank = self._flat.view(self.axis.size, self.part)
        own = by_rank[self.axis.rank]
        if self.axis.group is None:
            return own
        width = max(1, self.limit // self.axis.size)
        for part, kept in zip(by_rank.split(width, dim=1), own.split(width), strict=True):
            dist.reduce_scatter_tensor(kept, part.reshape(-1), group=self.axis.group)
        return own.div_(self.axis.size)


class PartSums(GradientSums):
    """The sums of this rank's part.

    Args:
        stages: the stage of every parameter.
    """

    def __init__(self, stages: Mapping[nn.Parameter, int], *arguments: Any):
        super().__init__(*arguments)
        self._own = torch.zeros(self.part, device=self.device)
        self._stages = stages
        sizes: dict[int, dict[nn.Parameter, int]] = {}
        for parameter, stage in reversed([*stages.items()]):
            sizes.setdefault(stage, {})[parameter] = parameter.numel()
        self._buckets = {stage: self._make_buckets(of_stage) for stage, of_stage in sizes.items()}

    def begin(self) -> None:
        self._own.zero_()

    def begin_backward(self, stage: int) -> None:
        self._buckets[stage].finish()

    def add(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        buckets = self._make_buckets({parameter: parameter.numel()})
        buckets.done(parameter, gradient.view(-1))
        buckets.finish()

    def mean(self) -> Tensor:
        for buckets in self._buckets.values():
            buckets.finish()
        return self._own

    def _made(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        self._buckets[self._stages[parameter]].done(parameter, gradient.view(-1))

    def _make_buckets(self, sizes: Mapping[nn.Parameter, int]) -> Buckets:
        return Buckets(sizes, self.axis, self.limit, self._keep)

    def _keep(self, parameter: nn.Parameter, mean: Tensor) -> None:
        """Add what lies in this rank's part of the flat tensor."""
        start, first = self.positions[parameter], self.axis.rank * self.part
        begin, end = max(start, first), min(start + mean.numel(), first + self.part)
        if begin < end:
            self._own[begin - first : end - first] += mean[begin - start : end - start]
