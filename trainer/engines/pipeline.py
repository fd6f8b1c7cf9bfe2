"""Forward and backward of an update's micro-batches through the stages of a pipeline."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from model.decoder import Decoder
from trainer.engines.base import MicroBatch, StepHooks, on_device
from trainer.engines.torch_pipelining import PipelineSchedule, StageHooks


def _nothing(stage: int, index: int) -> None: ...


class PipelinePasses:
    """The passes of this rank's stages. All ranks of a pipeline make it and call it alike.

    Args:
        kind: parallel.pipeline_schedule.
        hooks: `mark` gets "pipeline" when a rank has waited for other stages. `leave` is not asked: ranks are in the middle of
            different micro-batches.
        before_backward: called with the stage and the index of the micro-batch.
    """

    def __init__(self, model: Decoder, kind: str, hooks: StepHooks, before_backward: Callable[[int, int], object] = _nothing):
        self._model, self._kind = model, kind
        self._modules = {stage: _StageModule(model, stage) for stage in model.kit.pipeline.own}
        self._schedules: dict[tuple[int, int, int], PipelineSchedule] = {}

        def begin_backward(stage: int, index: int) -> None:
            hooks.mark("pipeline")
            before_backward(stage, index)

        self._hooks = StageHooks(
            lambda stage, index: hooks.mark("pipeline"), lambda stage, index: hooks.mark("forward"),
            begin_backward, lambda stage, index: hooks.mark("backward"),
        )  # fmt: skip

    def run(self, batches: Sequence[MicroBatch], scale: Tensor) -> Tensor:
        """Forward and backward of all of them, of the losses times `scale`; the sum of the losses in nats, 0-dim, which is 0
        but on the ranks with the last stage."""
        device = self._model.device
        rows, length = batches[0].inputs_BS.shape
        size = (len(batches), rows, length)
        if size not in self._schedules:
            stream = self._model.empty_stream(rows, length, torch.device("meta")).requires_grad_()
            self._schedules[size] = PipelineSchedule(
                self._kind, self._modules, self._model.kit.pipeline, stream, len(batches), self._hooks, device
            )
        total = torch.zeros((), device=device)
        for module in self._modules.values():
            module.scale, module.total = scale, total
        names = ("inputs_BS", "targets_BS", "cu_seqlens")
        self._schedules[size].run([dict(zip(names, on_device(batch, device), strict=True)) for batch in batches])
        return total


class _StageModule(nn.Module):
    """One stage of the decoder, of which it is no parent: the parameters keep their names."""

    def __init__(self, model: Decoder, stage: int):
        super().__init__()
        self._model, self._stage = (model,), stage
        self.scale: Any = 1.0
        self.total = torch.zeros(())
        """To which the last stage adds its losses."""

    def forward(self, x_TD: Tensor, *, inputs_BS: Tensor, targets_BS: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """The stream behind the stage, or of the last stage the loss times `scale`."""
        (model,) = self._model
        model.begin()
        rows, length = inputs_BS.shape
        positions = model.positions_for(model.token_layout(rows, length, cu_seqlens))
        x_TD = model.run_stage(self._stage, inputs_BS, None if self._stage == 0 else x_TD, positions, model.run_block)
        if self._stage + 1 < model.kit.pipeline.stages:
            return x_TD
        loss_sum, _ = model.loss(x_TD, targets_BS)
        self.total += loss_sum.detach()
        return loss_sum * self.scale
