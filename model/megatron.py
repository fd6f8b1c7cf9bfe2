"""Tensor parallelism: Megatron-Core's layers and process groups. The only door to Megatron-Core.

Imported when the tensor-parallel size is above 1, and only then: the import takes longer than all the rest of a command.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model import collectives
from model.layers import Kit, Linear, Norm, describe, identity

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that neither TransformerEngine nor Apex is installed: neither is wanted
    from megatron.core import ModelParallelConfig, parallel_state
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding


def make_groups(tensor_parallel_size: int, timeout_seconds: float) -> tuple[Any, Any]:
    """This rank's tensor-parallel and data-parallel groups (all ranks call it), whose collectives may take that long."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    minutes: Any = timeout_seconds / 60  # makes a timedelta, which takes fractions
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_parallel_size,
        distributed_timeout_minutes=minutes,
        create_gloo_process_groups=False,  # a second set of groups, which nobody here would use
    )
    return parallel_state.get_tensor_model_parallel_group(), parallel_state.get_data_parallel_group()


class _Column(ColumnParallelLinear):
    def forward(self, input_: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(input_)[0]


class _Row(RowParallelLinear):
    leave = staticmethod(identity)

    def forward(self, input_: Tensor) -> Tensor:  # type: ignore[override]
        return self.leave(super().forward(input_.contiguous())[0])

    def _forward_impl(self, *args: Any, **kwargs: Any) -> Tensor:
        # Without a group Megatron warns, on rank 0 only, and that would cut the compiled graph there.
        return super()._forward_impl(*args, **{**kwargs, "tp_group": self.tp_group})


class _VocabularyEmbedding(VocabParallelEmbedding):
    scatter = staticmethod(identity)

    def forward(self, tokens_T: Tensor) -> Tensor:  # type: ignore[override]
        return self.scatter(super().forward(tokens_T))


class MegatronKit(Kit):
    """Column, row and vocabulary-parallel layers; parameter names as in the kit of one device."""

    def __init__(self, group: Any, sequence_parallel: bool, dtype: torch.dtype):
        super().__init__(dtype)
        self.group, self.size, self.rank = group, dist.get_world_size(group), dist.get_rank(group)
        self.sequence_parallel = sequence_parallel
        self.settings = ModelParallelConfig(
            tensor_model_parallel_size=self.size,
            params_dtype=dtype,
            use_cpu_initialization=True,
            perform_initialization=False,  # model/decoder.py draws every weight, for the full tensor
            gradient_accumulation_fusion=False,  # would want gradient buffers of Megatron's own
            sequence_parallel=False,  # `enter` gathers the tokens once for all the column linears behind it
        )

    def column(self, inputs: int, outputs: int) -> Any:
        layer = _Column(
            inputs, outputs, config=self.settings, init_method=identity, bias=False,
            disable_grad_reduce=True, tp_group=self.group,
        )  # fmt: skip
        describe(layer.weight, "matrix", (outputs, inputs), 0)  # type: ignore[arg-type]
        return layer

    def row(self, inputs: int, outputs: int) -> Any:
        layer = _Row(
            inputs, outputs, config=self.settings, init_method=identity, bias=False,
            input_is_parallel=True, skip_bias_add=True, tp_group=self.group,
        )  # fmt: skip
        layer.explicit_expert_comm = True  # Megatron leaves the sum over ranks out: model/collectives.py says why
        layer.leave = self._leave  # type: ignore[method-assign]
        describe(layer.weight, "matrix", (outputs, inputs), 1)
        return layer

    def replicated(self, inputs: int, outputs: int) -> Any:
        return Linear(inputs, outputs, self.dtype, self._share)

    def embedding(self, rows: int, width: int) -> Any:
        layer = _VocabularyEmbedding(rows, width, config=self.settings, init_method=identity, tp_group=self.group)
        layer.scatter = self._scatter  # type: ignore[method-assign]
        describe(layer.weight, "embedding", (rows, width), 0)
        return layer

    def norm(self, size: int, eps: float) -> Any:
        return Norm(size, eps, self.dtype, self._share)

    def head_norm(self, size: int, eps: float) -> Any:
        return Norm(size, eps, self.dtype, self._complete)

    def enter(self, x: Tensor) -> Tensor:
        return collectives.gather_tokens(x, self.group) if self.sequence_parallel else self._complete(x)

    def gather(self, x: Tensor) -> Tensor:
        return collectives.gather_last(x, self.group)

    @contextmanager
    def tokens_whole(self) -> Iterator[None]:
        before, self.sequence_parallel = self.sequence_parallel, False
        try:
            yield
        finally:
            self.sequence_parallel = before

    def _leave(self, x_TD: Tensor) -> Tensor:
        return (collectives.reduce_scatter_tokens if self.sequence_parallel else collectives.reduce)(x_TD, self.group)

    def _complete(self, x: Tensor) -> Tensor:
        return collectives.share(x, self.group)

    def _share(self, weight: Tensor) -> Tensor:
        # With tokens split over ranks, each rank's gradient of a weight held whole covers its own tokens only.
        return self._complete(weight) if self.sequence_parallel else weight

    def _scatter(self, x_TD: Tensor) -> Tensor:
        return collectives.scatter_tokens(x_TD, self.group) if self.sequence_parallel else x_TD
