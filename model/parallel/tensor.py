"""Tensor parallelism with Megatron-Core's layers, on the process group of the mesh. The only module that imports Megatron-Core.

Imported when the tensor-parallel size is above 1, and only then: the import takes longer than all the rest of a command.
What is used of Megatron beyond its documented interface stands in `column_layer` and `row_layer`, each held by a test
(tests/model/parallel/test_tensor.py). Nothing of Megatron is replaced for the process: layers are subclassed. Its global
groups (parallel_state) are not initialised: every layer is given its group.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.parallel import collectives
from model.parallel.layers import Kit, Linear, Norm, SplitNorm, identity, set_linear_specs
from model.parameters import Initial, ParameterPart, set_spec

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that TransformerEngine and Apex are missing: neither is used
    from megatron.core import ModelParallelConfig
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding


def megatron_settings(size: int, dtype: torch.dtype) -> ModelParallelConfig:
    """Megatron's settings for layers that initialise nothing and communicate nothing of their own accord."""
    return ModelParallelConfig(
        tensor_model_parallel_size=size,
        params_dtype=dtype,
        use_cpu_initialization=True,
        perform_initialization=False,  # model/initialization.py draws every weight, for the full tensor
        gradient_accumulation_fusion=False,  # needs Megatron's own gradient buffers
        sequence_parallel=False,  # `column_input` gathers the tokens once for all the column layers behind it
    )


def column_layer(inputs: int, outputs: int, settings: ModelParallelConfig, group: Any, bias: bool = False) -> "_Column":
    """Megatron's column-parallel linear without its sum over ranks of the input's gradient, which is `column_input`'s.

    `disable_grad_reduce` is Megatron's switch for it.
    """
    return _Column(inputs, outputs, config=settings, init_method=identity, bias=bias, disable_grad_reduce=True, tp_group=group)


def row_layer(inputs: int, outputs: int, settings: ModelParallelConfig, group: Any, bias: bool = False) -> "_Row":
    """Megatron's row-parallel linear without its sum over ranks, which is `reduce_output`'s.

    `explicit_expert_comm` is Megatron's flag for layers of experts, whose dispatcher communicates for them. It has no argument.
    """
    layer = _Row(
        inputs, outputs, config=settings, init_method=identity, bias=bias,
        input_is_parallel=True, skip_bias_add=True, tp_group=group,
    )  # fmt: skip
    layer.explicit_expert_comm = True
    return layer


class _Column(ColumnParallelLinear):
    def forward(self, input_: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(input_)[0]


class _Row(RowParallelLinear):
    reduce_output = staticmethod(identity)
    replicate = staticmethod(identity)

    def forward(self, input_: Tensor) -> Tensor:  # type: ignore[override]
        out, bias = super().forward(input_.contiguous())
        total = self.reduce_output(out)
        return total if bias is None else total + self.replicate(bias)


class _VocabularyEmbedding(VocabParallelEmbedding):
    scatter_tokens = staticmethod(identity)

    def forward(self, tokens_T: Tensor) -> Tensor:  # type: ignore[override]
        return self.scatter_tokens(super().forward(tokens_T))


class MegatronKit(Kit):
    """Column, row and vocabulary-parallel layers; parameter names as in the kit of one device."""

    def __init__(self, group: Any, sequence_parallel: bool, dtype: torch.dtype):
        super().__init__(dtype, dist.get_world_size(group))
        self.group, self.rank = group, dist.get_rank(group)
        self.sequence_parallel = sequence_parallel
        self.settings = megatron_settings(self.size, dtype)

    def column(
        self, inputs: int, outputs: int, initial: Initial, part: ParameterPart, bias: bool = False, padding: int = 0
    ) -> Any:
        layer = column_layer(inputs, outputs + padding, self.settings, self.group, bias)
        set_linear_specs(layer, self._linear((outputs, inputs), 0, initial, part, bias, padding))
        return layer

    def row(
        self, inputs: int, outputs: int, initial: Initial, part: ParameterPart, bias: bool = False, summed: bool = True
    ) -> Any:
        layer = row_layer(inputs, outputs, self.settings, self.group, bias)
        if summed:
            layer.reduce_output = self.summed_output  # type: ignore[method-assign]
        layer.replicate = self._replicate_weight  # type: ignore[method-assign]
        set_linear_specs(layer, self._linear((outputs, inputs), 1, initial, part, bias))
        return layer

    def replicated(self, inputs: int, outputs: int, initial: Initial, part: ParameterPart, bias: bool = False) -> Any:
        specs = self._linear((outputs, inputs), None, initial, part, bias)
        return Linear(inputs, outputs, specs, self.dtype, self._replicate_weight)

    def embedding(self, rows: int, width: int, initial: Initial, padding: int = 0) -> Any:
        layer = _VocabularyEmbedding(rows + padding, width, config=self.settings, init_method=identity, tp_group=self.group)
        layer.scatter_tokens = self._scatter_tokens  # type: ignore[method-assign]
        set_spec(layer.weight, self._embedding(rows, width, initial, padding))
        return layer

    def norm(self, size: int, eps: float, zero_centered: bool) -> Any:
        return Norm(size, eps, self.dtype, self._replicate_weight, zero_centered=zero_centered)

    def head_norm(self, size: int, eps: float, zero_centered: bool) -> Any:
        return Norm(size, eps, self.dtype, self.replicate, over_heads=True, zero_centered=zero_centered)

    def split_norm(self, size: int, eps: float, zero_centered: bool) -> Any:
        return SplitNorm(size, eps, self.dtype, zero_centered, self.size, self._sum_for_all)

    def column_input(self, x: Tensor) -> Tensor:
        return collectives.gather_tokens(x, self.group) if self.sequence_parallel else self.replicate(x)

    def gather_last(self, x: Tensor) -> Tensor:
        return collectives.gather_last(x, self.group)

    def stream_tokens(self, tokens: int) -> int:
        return tokens // self.size if self.sequence_parallel else tokens

    @contextmanager
    def tokens_whole(self) -> Iterator[None]:
        before, self.sequence_parallel = self.sequence_parallel, False
        try:
            yield
        finally:
            self.sequence_parallel = before

    def summed_output(self, x_TD: Tensor) -> Tensor:
        reduce = collectives.reduce_scatter_tokens if self.sequence_parallel else collectives.all_reduce
        return reduce(x_TD, self.group)

    def _sum_for_all(self, x: Tensor) -> Tensor:
        # every rank needs the sum, for outputs of its own
        return self.replicate(collectives.all_reduce(x, self.group))

    def replicate(self, x: Tensor) -> Tensor:
        return collectives.replicate(x, self.group)

    def _replicate_weight(self, weight: Tensor) -> Tensor:
        # With tokens split over ranks, each rank's gradient of a replicated weight covers its own tokens only.
        return self.replicate(weight) if self.sequence_parallel else weight

    def _scatter_tokens(self, x_TD: Tensor) -> Tensor:
        return collectives.scatter_tokens(x_TD, self.group) if self.sequence_parallel else x_TD
