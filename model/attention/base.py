"""What every kind of attention has, and what attention over given heads costs."""

from typing import Any

import torch
from torch import Tensor

from model.attention.heads import AttentionConfig, HeadSizes
from model.attention.kernels import cpu_dense
from model.attention.kernels.dispatch import AttentionProblem, preferred_backend
from model.attention.kernels.inputs import AttentionInputs, accumulation_dtype
from model.attention.kernels.operator import attend, attend_with_lse
from model.attention.kv_cache import LayerKVCache
from model.attention.logits import LogitRows
from model.attention.sliding_window import LayerPositions
from model.parallel.layers import Kit
from model.positions.batch import Positions
from model.sublayer import Execution, Kept, Sublayer


class Attention(Sublayer):
    """Causal self-attention of one layer, its query heads split over tensor-parallel ranks.

    A kind is a subclass in a file of its own, with its keys, and an entry in model.config.ATTENTION.
    """

    scale: float
    """Multiplies the products of queries and keys."""
    largest_logit_n: Tensor | None = None
    """`record_logits`."""

    def __init__(self, config: AttentionConfig, layer: int, kit: Kit):
        super().__init__(config, kit)
        self.layer_positions = LayerPositions(config, layer)
        self.compiled = False
        """Whether the block is compiled, and with it the attention of a CPU."""
        self.sizes = self.head_sizes(config)
        self.query_heads = config.num_attention_heads
        self.local_heads = kit.divide("num_attention_heads", config.num_attention_heads)

    @staticmethod
    def head_sizes(config: Any) -> HeadSizes:
        """The sizes that follow from the kind's keys."""
        raise NotImplementedError

    @staticmethod
    def describe(config: Any) -> str:
        """The kind in words, for the summary of a run."""
        raise NotImplementedError

    def project(self, h_TD: Tensor, positions: Positions) -> tuple[Tensor, Tensor, Tensor]:
        """What `attention_inputs` takes, of this rank's heads, not yet rotated."""
        raise NotImplementedError

    def attention_inputs(self, *projected: Any) -> AttentionInputs:
        """Rotated queries and keys from what `project` gives and the positions, with far ones where there are far pairs:
        without a cache."""
        raise NotImplementedError

    def forward(self, h_TD: Tensor, positions: Positions, cache: LayerKVCache | None = None) -> Tensor:
        """What the layer adds to the residual stream, [T, D] (T / tensor-parallel ranks under sequence parallelism).

        Args:
            h_TD: normed residual stream.
            positions: positions of this forward pass.
            cache: keys and values of earlier tokens; those of this pass are appended.
        """
        raise NotImplementedError

    def logit_rows(self) -> dict[str, LogitRows]:
        """By the name of a weight in this layer: how its rows, and the elements of its bias, follow the logits of the heads; of
        the full tensors. Nothing between these rows and the logits may undo a factor, as a norm would."""
        raise NotImplementedError

    def record_logits(self, device: torch.device) -> None:
        """From now on every forward with gradients raises `largest_logit_n` [n], of this rank's heads, to a bound of its
        logits.

        The bound is the largest log-sum-exp over the queries of a head, which kernels have anyway: it lies between the largest
        scaled score and that plus the logarithm of the tokens seen. Scores that are large and negative do not count: the
        softmax is as moderate with them as without. A forward that recomputation repeats changes nothing.
        """
        self.largest_logit_n = torch.zeros(self.local_heads, dtype=accumulation_dtype(self.kit.dtype), device=device)

    def attend(self, inputs: AttentionInputs, window: int | None, positions: Positions, compiled: bool) -> Tensor:
        """The results of this rank's heads, [B, S, n, value]; arguments as model.attention.kernels.operator.attend."""
        if self.largest_logit_n is None or not torch.is_grad_enabled():  # without gradients: an evaluation
            return attend(inputs, self.scale, window, positions.documents, compiled)
        out, lse_BSn = attend_with_lse(inputs, self.scale, window, positions.documents, compiled)
        self.largest_logit_n.copy_(torch.maximum(self.largest_logit_n, lse_BSn.amax(dim=(0, 1))))
        return out

    def score_flops(self, sequence_length: int, causal: bool) -> float:
        """Forward FLOPs per token in q.k and in the sum over values, over all ranks, averaged over the sequence.

        With `causal` the scores on and below the diagonal (inside the window of a windowed layer) are counted, without it all
        that a kernel without a mask computes. The two regions of ReRoPE together have the scores of one causal attention.
        """
        window = min(self.layer_positions.sliding_window or sequence_length, sequence_length)
        scores: float = window
        if causal:
            scores = (window * (window + 1) / 2 + (sequence_length - window) * window) / sequence_length
        return 2.0 * scores * self.query_heads * (self.sizes.head + self.sizes.value)

    def pointwise_elements(self) -> float:
        """As Sublayer.pointwise_elements: rotations read and write queries, keys and values."""
        sizes = self.sizes
        heads = self.query_heads * sizes.head + sizes.kv_heads * (sizes.head + sizes.value)
        return 2 * heads / self.kit.size

    def attend_kept(self, execution: Execution, sequence_length: int, kv_heads: float) -> Kept:
        """What attention alone holds: queries, keys, values of `kv_heads` heads on this rank, its result and statistics."""
        element, n, k, H, value = execution.element_bytes, self.local_heads, kv_heads, self.sizes.head, self.sizes.value
        dense_keys = self.dense_keys(execution, sequence_length)
        vectors = n * H + k * (H + value) + n * value
        products = everything = element * vectors + 4.0 * n
        if dense_keys:  # keys and values repeated for every query head, the result twice, the probabilities
            products = element * (vectors + n * dense_keys)
            everything = element * n * (2 * H + 3 * value + dense_keys)
        far_regions = execution.regions - 1 if self.layer_positions.takes_far_region else 0
        return Kept(products, everything + element * far_regions * (n + k) * H)

    def dense_keys(self, execution: Execution, sequence_length: int) -> float:
        """Probabilities kept per query, on average, by the CPU's dense kernel: a block of queries meets the keys up to its
        end. 0 where another kernel runs."""
        dtype = torch.bfloat16 if execution.element_bytes == 2 else torch.float32
        two_regions = execution.regions > 1 and self.layer_positions.takes_far_region
        sliding = self.layer_positions.sliding_window
        window = sequence_length if two_regions else sliding if sliding and sliding < sequence_length else None
        problem = AttentionProblem(
            execution.device, dtype, self.sizes.head, self.sizes.value, sequence_length,
            window=window, two_regions=two_regions, compiled=execution.compiled,
        )  # fmt: skip
        if preferred_backend(problem) != "cpu_dense":
            return 0.0
        starts = range(0, sequence_length, cpu_dense.DENSE_ROWS)
        ends = [min(start + cpu_dense.DENSE_ROWS, sequence_length) for start in starts]
        return sum((end - start) * end for start, end in zip(starts, ends, strict=True)) / sequence_length
