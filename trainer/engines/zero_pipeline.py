"""ZeRO 1 and 2 under pipeline parallelism.

DeepSpeed keeps weights and masters of a rank's stages, cuts the masters for the replicas and gathers updated weights. Its
reduction of gradients would sum micro-batches in the network's dtype, and in its own order; the sums are ours
(trainer/engines/gradient_sums.py), in float32.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from model.decoder import Decoder
from model.parallel.mesh import Axis, Mesh
from trainer.config import ParallelConfig, TrainConfig
from trainer.engines.base import NO_HOOKS, MicroBatch, StepHooks, count_targets
from trainer.engines.deepspeed_internals import (
    MasterSlice,
    copy_masters_to_weights,
    flat_positions,
    leave_gradients_alone,
)
from trainer.engines.gradient_sums import GradientSums, PartSums, WholeSums
from trainer.engines.pipeline import PipelinePasses
from trainer.engines.tied_embedding import TiedEmbedding
from trainer.engines.zero import Zero
from trainer.optimizers.config import OptimizerConfig
from trainer.optimizers.step import UpdateResult


class ZeroPipeline(Zero):
    """Zero, of the stages of a rank.

    Args:
        hooks: `leave` is not asked (trainer/engines/pipeline.py).
    """

    def __init__(
        self, model: Any, parallel: ParallelConfig, optimizer: OptimizerConfig, train: TrainConfig,
        mesh: Mesh, rms_floor: Mapping[str, float], hooks: StepHooks = NO_HOOKS,
    ):  # fmt: skip
        super().__init__(model, parallel, optimizer, train, mesh, rms_floor, hooks)
        leave_gradients_alone(self.zero)
        positions, part = flat_positions(self.zero)
        where = (positions, part, mesh.replicas, parallel.reduce_bucket_elements, mesh.device)
        several = self.stage == 2 and mesh.replicas.size > 1
        stages = {parameter: stage for parameter, stage in self._stages().items() if parameter in positions}
        self._sums: GradientSums = PartSums(stages, *where) if several else WholeSums(*where)
        self._tied = TiedEmbedding(model, mesh)
        copy = self._tied.copy
        alone = (Axis(), parallel.reduce_bucket_elements, mesh.device)
        self._copied = None if copy is None else WholeSums({copy: 0}, copy.numel(), *alone)
        """Of the copy of a tied embedding."""
        self._mean: Tensor | None = None
        self._passes = PipelinePasses(
            model, parallel.pipeline_schedule, hooks, lambda stage, index: self._begin_backward(stage)
        )  # fmt: skip

    def accumulate(self, batches: Sequence[MicroBatch]) -> Tensor:
        """Forward and backward of every micro-batch of one update; see Engine."""
        mesh = self.mesh
        count = count_targets(batches, mesh)
        self._clip.begin()
        self._balance.begin()
        self.model.set_loss_scale(mesh.replicas.size / count)
        for sums in self._all_sums():
            sums.begin()
        total = self._passes.run(batches, mesh.replicas.size / count)
        received = self._tied.collect(None if self._copied is None else self._copied.mean())
        if received is not None and self._tied.owned is not None:
            self._sums.add(self._tied.owned, received)
        self._mean = self._sums.mean()
        self._see_rows(batches)
        self._logits, self._loads = self._clip.finish(), self._balance.finish()
        return mesh.pipeline.sum(mesh.replicas.sum(total)) / count

    def update(self, learning_rate: float, skip: bool = False) -> UpdateResult:
        """One optimizer step on the accumulated gradients; see Engine."""
        self.steps_done += 1
        result = self._leave_out() if skip else self._update(learning_rate)
        if not skip:
            copy_masters_to_weights(self.zero, self.stage)
            self._tied.share()
        self._mean = None
        return self._updated(result)

    def _all_sums(self) -> list[GradientSums]:
        experts = None if self._experts is None else self._experts.sums
        return [sums for sums in (self._sums, self._copied, experts) if sums is not None]

    def _begin_backward(self, stage: int) -> None:
        self._sums.begin_backward(stage)
        if self._experts is not None:
            self._experts.sums.begin_backward(stage)

    def _stages(self) -> Mapping[nn.Parameter, int]:
        return _stages(self.model)

    def _gradient(self, part: MasterSlice) -> Tensor:
        assert self._mean is not None
        return part.of(self._mean)

    def loaded(self, step: int) -> None:
        """Round the masters into the weights of this rank's stages, and gather and share these."""
        super().loaded(step)
        self._tied.share()

    def close(self) -> None:
        """Remove all hooks from the model."""
        super().close()
        for sums in self._all_sums():
            sums.close()


def _stages(model: Decoder) -> dict[nn.Parameter, int]:
    """The stage of every parameter that a rank owns, in the order of the network."""
    pipeline, config = model.kit.pipeline, model.config
    stage_of = {
        parameter: stage
        for stage in pipeline.own
        for layer in pipeline.layers(stage, config.num_hidden_layers)
        for parameter in model.model.layers[layer].parameters()
    }
    ends = {True: 0, False: pipeline.stages - 1}
    owned = model.owned_parameters().items()
    return {p: stage_of.get(p, ends[name.startswith("model.embed_tokens.")]) for name, p in owned}
