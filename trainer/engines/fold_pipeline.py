"""Fold under pipeline parallelism: no gradient of a stage outlives its own backward.

Forwards and backwards of different micro-batches alternate, and each backward folds what it makes; no gradients are summed up
for the end of the update, however many micro-batches are in flight. One gradient is: that of the copy of a tied embedding,
whose momentum lies on another rank (trainer/engines/tied_embedding.py). It is summed in float32 and folded once, as one more
micro-batch.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from model.decoder import Decoder
from model.parallel.mesh import Mesh
from trainer.engines.base import NO_HOOKS, MicroBatch, StepHooks
from trainer.engines.fold import Fold
from trainer.engines.pipeline import PipelinePasses
from trainer.engines.tied_embedding import TiedEmbedding
from trainer.optimizers.config import OptimizerConfig
from trainer.optimizers.fragments import Fragment
from trainer.optimizers.step import UpdateResult


class FoldPipeline(Fold):
    """Fold, of the stages of a rank.

    `grad_norm` counts the two gradients of a tied embedding as if they were of two weights.

    Args:
        schedule: parallel.pipeline_schedule.
        options: of Fold.
    """

    def __init__(
        self, model: Decoder, settings: OptimizerConfig, mesh: Mesh, *,
        schedule: str, hooks: StepHooks = NO_HOOKS, **options: Any,
    ):  # fmt: skip
        self._decoder, self._tied = model, TiedEmbedding(model, mesh)
        super().__init__(model, settings, mesh, hooks=hooks, **options)
        self._passes = PipelinePasses(model, schedule, hooks, lambda stage, index: self._begin_backward(index))
        self._copied: Tensor | None = None
        """Sum of the gradients of the copy, float32."""
        if self._tied.copy is not None:
            self._copied = torch.zeros_like(self._tied.copy.data, dtype=torch.float32)
            self._hooks.append(self._tied.copy.register_post_accumulate_grad_hook(self._add_to_copied))

    def _pass_all(self, batches: Sequence[MicroBatch], scale: Tensor) -> Tensor:
        if self._copied is not None:
            self._copied.zero_()
        total = self._passes.run(batches, scale)
        received = self._tied.collect(self._copied)
        if received is not None:
            self._begin_backward(len(batches))
            self._fold(self._by_name[_EMBEDDING], received.view(-1), counts=False)
        return total

    def _is_complete(self, fragment: Fragment) -> bool:
        more = fragment.name == _EMBEDDING and self._tied.owned is not None
        return self._folds[fragment.name] == self._micro_batches + more

    @torch.no_grad()
    def _add_to_copied(self, copy: Tensor) -> None:
        gradient, copy.grad = copy.grad, None
        assert gradient is not None and self._copied is not None
        self._gradient_square = self._gradient_square + self._mask_and_square(gradient.view(-1))
        self._copied += gradient

    def update(self, learning_rate: float, skip: bool = False) -> UpdateResult:
        """Move the weights along the directions of their rules, and the copy of a tied embedding with them; see Fold."""
        result = super().update(learning_rate, skip)
        self._tied.share()
        return result

    def loaded(self, step: int) -> None:
        """As Fold, and the copy of a tied embedding gets its owner's values."""
        super().loaded(step)
        self._tied.share()


_EMBEDDING = "model.embed_tokens.weight"
