"""What every kind of attention has, and what attention over given heads costs."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from model.attention.heads import AttentionConfig, HeadSizes
from model.attention.kernels import cpu_dense
from model.attention.kernels.dispatch import AttentionProblem, preferred_backend
from model.attention.kernels.inputs import AttentionInputs, KeysAndValues, accumulation_dtype
from model.attention.kernels.operator import attend, attend_with_lse
from model.attention.kv_cache import LayerKVCache
from model.attention.logits import LogitRows
from model.attention.row_cache import LayerRowCache, MergedAttention
from model.attention.sliding_window import LayerPositions
from model.parallel.layers import Kit
from model.positions.batch import Positions
from model.positions.packing import PackedDocuments
from model.recompute import products_not_saved
from model.sublayer import Execution, Kept, Sublayer

LayerCache = LayerKVCache | LayerRowCache
"""What a layer keeps of earlier tokens."""


@dataclass(frozen=True)
class AttentionPart:
    """What one call of a kernel computes; arguments as model.attention.kernels.operator.attend."""

    inputs: AttentionInputs
    window: int | None
    documents: PackedDocuments | None
    first_head: int = 0
    """Of this rank's heads."""


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

    @staticmethod
    def cached_width(config: Any, ranks: int) -> int:
        """Elements per token that one of so many tensor-parallel ranks keeps of rows in chunks: those that `expand` takes."""
        raise NotImplementedError

    def project(self, h_TD: Tensor, positions: Positions) -> tuple[Tensor, ...]:
        """Queries [B, S, n, size] of this rank's heads, and what their keys and values are made of, [B, S, heads, size] each;
        not yet rotated."""
        raise NotImplementedError

    def expand(self, *sources: Tensor) -> tuple[Tensor, ...]:
        """What `keys` takes, [B, S, heads, size] each, from what `project` gives beside the queries."""
        return sources

    def queries(self, q: Tensor, positions: Positions) -> tuple[Tensor, Tensor | None]:
        """Rotated for near and, where there are far pairs, for far ones: without a cache."""
        raise NotImplementedError

    def keys(self, *expanded: Tensor, positions: Positions, start: int = 0) -> KeysAndValues:
        """Rotated keys and values of the tokens from `start` on, with far ones where there are far pairs: without a cache."""
        raise NotImplementedError

    def attention_inputs(self, q: Tensor, *expanded: Tensor, positions: Positions) -> AttentionInputs:
        """Rotated queries and keys of the same tokens, with far ones where there are far pairs: without a cache."""
        (near_q, far_q), keys = self.queries(q, positions), self.keys(*expanded, positions=positions)
        return AttentionInputs(near_q, keys.near_k, keys.v, far_q, keys.far_k)

    def forward(self, h_TD: Tensor, positions: Positions, cache: LayerCache | None = None) -> Tensor:
        """What the layer adds to the residual stream, [T, D] (T / tensor-parallel ranks under sequence parallelism).

        Args:
            h_TD: normed residual stream.
            positions: positions of this forward pass.
            cache: keys and values of earlier tokens, for decoding or for rows in chunks; those of this pass are appended.
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

    def attend_projected(self, q: Tensor, *sources: Tensor, positions: Positions, compiled: bool) -> Tensor:
        """The results of this rank's heads for this rank's tokens, [B, S, n, value], from what `project` gives."""
        results = [self.attend(part, compiled) for part in self.parts(q, *sources, positions=positions)]
        out = results[0] if len(results) == 1 else torch.cat(results, dim=1)
        return self.kit.context.from_heads(out) if self.kit.context.exchanges_heads else out

    def parts(self, q: Tensor, *sources: Tensor, positions: Positions) -> Iterable[AttentionPart]:
        """What this rank computes one after the other, from what `project` gives."""
        if self.kit.context.gathers_keys:
            return self._gathered_parts(q, *sources, positions=positions)
        return [self._whole_part(q, *sources, positions=positions)]

    def _whole_part(self, q: Tensor, *sources: Tensor, positions: Positions) -> AttentionPart:
        """Whole rows: of all heads, or of this rank's share of them where ranks exchange heads."""
        context, expanded = self.kit.context, self.expand(*sources)
        if context.exchanges_heads:
            q, *expanded = context.to_heads(q, *expanded)
        inputs = self.attention_inputs(q, *expanded, positions=positions)
        if context.exchanges_heads:  # the values are a slice of all that has arrived, which would be kept with them
            inputs = replace(inputs, v=inputs.v.contiguous())
        window, first_head = self.layer_positions.kernel_window(positions), context.rank * q.shape[2]
        return AttentionPart(inputs, window, positions.documents, first_head)

    def _gathered_parts(self, q: Tensor, *sources: Tensor, positions: Positions) -> Iterator[AttentionPart]:
        """This rank's chunks of queries, each with the keys of all ranks up to its last token. Those of the second half of a
        row travel while the first part is computed."""
        halves = self.kit.context.begin_gather(*sources)
        near_q, far_q = self.queries(q, positions)
        window, keys, done = self.layer_positions.kernel_window(positions), None, 0
        for half, chunk in zip(halves, positions.chunks, strict=True):
            start = 0 if keys is None else keys.tokens
            gathered = half.result(None if keys is None else chunk.end - start)
            with products_not_saved():
                expanded = self.expand(*gathered)
            arrived = self.keys(*expanded, positions=positions, start=start)
            # the first values are a slice of all that has arrived, which would be kept with them
            keys = replace(arrived, v=arrived.v.contiguous()) if keys is None else keys.followed_by(arrived)
            seen, own = keys.before(chunk.end), slice(done, done + chunk.end - chunk.start)
            inputs = AttentionInputs(near_q[:, own], seen.near_k, seen.v, far_q if far_q is None else far_q[:, own], seen.far_k)
            one_region = window is None or window >= chunk.end
            yield AttentionPart(inputs.near() if one_region else inputs, None if one_region else window, chunk.documents)
            done = own.stop

    def attend_chunk(self, q: Tensor, *sources: Tensor, positions: Positions, cache: LayerRowCache, compiled: bool) -> Tensor:
        """The results of this rank's heads for the latest chunk of longer rows, [B, C, n, value], from what `project` gives of
        it; `cache` has the tokens before it."""
        near_q, far_q = self.queries(q, positions)
        window, recent = self.layer_positions.kernel_window(positions), cache.with_recent(sources)
        keys = self.keys(*self.expand(*recent.parts), positions=positions, start=recent.start)
        inputs = AttentionInputs(near_q, keys.near_k, keys.v, far_q, keys.far_k)
        if window is None or window >= keys.tokens:
            inputs, window = inputs.near(), None
        documents = cache.cache.documents(recent.start, None if inputs.far_q is None else window, q.device)
        recent_results = attend_with_lse(inputs, self.scale, window, documents, compiled)
        merged = MergedAttention(*recent_results, cache.cache, self.scale)
        for block in cache.earlier():
            keys = self.keys(*self.expand(*block.parts), positions=positions, start=block.start)
            if far_q is None or keys.far_k is None:
                merged.add(near_q, keys.near_k, keys.v, block.start)
            else:
                merged.add(far_q, keys.far_k, keys.v, block.start)
        cache.keep(sources)
        return merged.result()

    def attend(self, part: AttentionPart, compiled: bool) -> Tensor:
        """[B, queries, heads, value]."""
        if self.largest_logit_n is None or not torch.is_grad_enabled():  # without gradients: an evaluation
            return attend(part.inputs, self.scale, part.window, part.documents, compiled)
        out, lse_BSn = attend_with_lse(part.inputs, self.scale, part.window, part.documents, compiled)
        largest_n = self.largest_logit_n.narrow(0, part.first_head, out.shape[2])
        largest_n.copy_(torch.maximum(largest_n, lse_BSn.amax(dim=(0, 1))))
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

    def sources(self) -> tuple[tuple[int, int], ...]:
        """Heads on this rank and width of each tensor that `project` gives beside the queries."""
        raise NotImplementedError

    def expanded(self) -> tuple[tuple[int, int], ...]:
        """The same of what `expand` gives."""
        return self.sources()

    def expand_flops(self) -> float:
        """Forward FLOPs per token of `expand`, over all tensor-parallel ranks: part of `matrix_flops`. Where keys are gathered
        a rank expands those of other ranks' tokens too."""
        return 0.0

    def gathered_elements(self) -> int:
        """Elements per token that context-parallel ranks gather of each other's keys and values."""
        return sum(heads * width for heads, width in self.sources())

    def exchanged_elements(self, ranks: int) -> tuple[int, int]:
        """Elements per own token that one of so many context-parallel ranks exchanges for heads, and of the results that go
        back. Heads fewer than ranks are repeated."""
        keys = sum((ranks if heads % ranks else heads) * width for heads, width in self.expanded())
        return self.local_heads * self.sizes.head + keys, self.local_heads * self.sizes.value

    def can_exchange_heads(self, ranks: int) -> bool:
        """Whether so many context-parallel ranks can exchange tokens for heads: they divide the query heads, and divide those
        of keys and values or are divided by them."""
        return self.local_heads % ranks == 0 and all(h % ranks == 0 or ranks % h == 0 for h, _ in self.expanded())

    def exchange_traffic(self, execution: Execution) -> float:
        """Elements per own token that fused pointwise kernels read and write for the exchange between context-parallel ranks,
        in the forward: what is sent is packed, what arrives is put in order; gathered keys are rotated on every rank."""
        ranks = execution.context_parallel_size
        if execution.gathers_keys:
            keys = self.sizes.kv_heads * (self.sizes.head + self.sizes.value) / self.kit.size
            return 2 * (1 + ranks) * self.gathered_elements() + (2 * (ranks - 1) + 2 * ranks) * keys
        return 4.0 * sum(self.exchanged_elements(ranks)) if execution.exchanges_heads else 0.0

    def pointwise_elements(self) -> float:
        """As Sublayer.pointwise_elements: rotations read and write queries, keys and values."""
        sizes = self.sizes
        heads = self.query_heads * sizes.head + sizes.kv_heads * (sizes.head + sizes.value)
        return 2 * heads / self.kit.size

    def attend_kept(self, execution: Execution, sequence_length: int, kv_heads: float) -> Kept:
        """What attention alone holds: queries, keys, values of `kv_heads` heads on this rank, its result and statistics."""
        element, n, k, H, value = execution.element_bytes, self.local_heads, kv_heads, self.sizes.head, self.sizes.value
        probabilities = self.probabilities(execution, sequence_length)
        vectors = n * H + k * (H + value) + n * value
        statistics = 0.0 if probabilities and not execution.gathers_keys else 4.0 * n
        products = everything = element * (vectors + probabilities) + statistics
        far_regions, far_heads = execution.regions - 1 if self.layer_positions.takes_far_region else 0, float(n + k)
        if execution.gathers_keys:
            held, far_heads = self._gathered_kept(execution, k, probabilities)
            everything = element * held + 4.0 * n
        elif probabilities:  # keys and values repeated for every query head, the result twice
            everything = element * (n * (2 * H + 3 * value) + probabilities)
        elif execution.exchanges_heads:
            held, far_heads = self._exchanged_kept(execution, k)
            everything = element * held + 4.0 * n
        return Kept(products, everything + element * far_regions * far_heads * H)

    def _gathered_kept(self, execution: Execution, kv_heads: float, probabilities: float) -> tuple[float, float]:
        """Elements per own token of queries, keys, values and results that a rank holds which gathers keys, and far heads.

        It holds keys and values of the first half of a sequence, and once more joined with those of the second half up to its
        last token: the first rank, whose late chunk is the last, all of them. Results are there as the kernel returned them and
        as the output's projection takes them.
        """
        n, H, value, ranks = self.local_heads, self.sizes.head, self.sizes.value, execution.context_parallel_size
        early, whole = ranks / 2, ranks
        held = n * (H + 2 * value) + whole * kv_heads * (H + value)
        keys = early * kv_heads * (H + value)
        if probabilities:  # the CPU's dense kernel has the first rank's early chunk, in copies
            keys = max(keys, n * (H + value / 2) + probabilities)
        return held + keys, n + (early + whole) * kv_heads

    def _exchanged_kept(self, execution: Execution, kv_heads: float) -> tuple[float, float]:
        """The same of a rank that exchanges tokens for heads: results are there as computed and as they came back."""
        n, H, value, ranks = self.local_heads, self.sizes.head, self.sizes.value, execution.context_parallel_size
        heads = kv_heads if kv_heads % ranks == 0 else ranks
        return n * (H + 2 * value) + heads * (H + value), n + heads

    def probabilities(self, execution: Execution, sequence_length: int) -> float:
        """Elements per own token of the probabilities that the CPU's dense kernel keeps; 0 where another runs. Where keys are
        gathered only the first rank's early chunk has as many keys as queries, half of its tokens."""
        length, share = sequence_length, 1.0
        if execution.gathers_keys:
            length, share = max(1, length // (2 * execution.context_parallel_size)), 0.5
        return share * self.local_heads * self._dense_keys(execution, length)

    def _dense_keys(self, execution: Execution, length: int) -> float:
        """Probabilities kept per query and head of a row of `length` tokens, on average, by the CPU's dense kernel: a block of
        queries meets the keys up to its end."""
        dtype = torch.bfloat16 if execution.element_bytes == 2 else torch.float32
        two_regions = execution.regions > 1 and self.layer_positions.takes_far_region
        sliding = self.layer_positions.sliding_window
        window = length if two_regions else sliding if sliding and sliding < length else None
        problem = AttentionProblem(
            execution.device, dtype, self.sizes.head, self.sizes.value, length,
            window=window, two_regions=two_regions, compiled=execution.compiled,
        )  # fmt: skip
        if preferred_backend(problem) != "cpu_dense":
            return 0.0
        starts = range(0, length, cpu_dense.DENSE_ROWS)
        ends = [min(start + cpu_dense.DENSE_ROWS, length) for start in starts]
        return sum((end - start) * end for start, end in zip(starts, ends, strict=True)) / length
