"""Grouped-query attention (Ainslie et al. 2023); multi-head and multi-query are its ends. Names are Hugging Face Llama's."""

from typing import Any

from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from model.attention.base import Attention, LayerCache
from model.attention.heads import AttentionConfig, HeadSizes
from model.attention.kernels.inputs import KeysAndValues
from model.attention.kernels.operator import attend
from model.attention.logits import LogitRows
from model.attention.row_cache import LayerRowCache
from model.parallel.layers import Kit
from model.positions.batch import Positions
from model.sublayer import Execution, Kept, norm_bytes


class GroupedQueryConfig(AttentionConfig, frozen=True):
    """Keys of grouped-query attention."""

    num_key_value_heads: int | None = Field(
        default=None, gt=0, description="Key and value heads K: N is MHA, 1 is MQA, between is GQA. Default N. Unused by MLA."
    )
    head_dim: int | None = Field(default=None, gt=0, description="Width H of a head (even). Default hidden_size / heads.")


class GroupedQueryAttention(Attention):
    """Grouped-query attention with rotary positions, its heads split over tensor-parallel ranks."""

    section = GroupedQueryConfig

    def __init__(self, config: GroupedQueryConfig, layer: int, kit: Kit):
        super().__init__(config, layer, kit)
        self.qk_norm, start = config.qk_norm, config.initial
        N, K, H, D = config.num_attention_heads, self.sizes.kv_heads, self.sizes.head, config.hidden_size
        self.head_size = H
        self.replicated_kv = K % kit.size != 0
        """The ranks do not divide the kv heads: every rank computes all of them and keeps that of its query heads."""
        if self.replicated_kv and kit.size % K:
            raise ValueError(
                f"model.num_key_value_heads = {K} and parallel.tensor_parallel_size = {kit.size}: one must divide the other"
            )
        kv_linear, bias = kit.replicated if self.replicated_kv else kit.column, config.attention_bias != "none"
        self.q_proj = kit.column(D, N * H, start, "attention", bias)
        self.k_proj = kv_linear(D, K * H, start, "attention", bias)
        self.v_proj = kv_linear(D, K * H, start, "attention", bias)
        self.o_proj = kit.row(N * H, D, config.residual_initial, "attention", config.attention_bias == "all")
        self.q_norm, self.k_norm = self._norms(config)
        self.scale = 1.0 if config.qk_norm == "key-l2" else (config.query_pre_attn_scalar or H) ** -0.5
        self.local_kv_heads = max(1, K // kit.size)

    def _norms(self, config: GroupedQueryConfig) -> tuple[Any, Any]:
        """Of queries and of keys. Ranks that all have every key norm them alike: gain and gradient are then whole."""
        self.zero_centered = zero_centered = config.zero_centered_gains
        kit, eps, H = self.kit, config.rms_norm_eps, self.head_size
        match config.qk_norm:
            case "rms":
                return kit.head_norm(H, eps, zero_centered), kit.head_norm(H, eps, zero_centered)
            case "rms-all-heads":
                over_keys = kit.norm if self.replicated_kv else kit.split_norm
                q_norm = kit.split_norm(config.num_attention_heads * H, eps, zero_centered)
                return q_norm, over_keys(self.sizes.kv_heads * H, eps, zero_centered)
            case _:
                return None, None

    @staticmethod
    def head_sizes(config: GroupedQueryConfig) -> HeadSizes:
        """As Attention.head_sizes."""
        heads = config.num_attention_heads
        size = config.head_dim or config.hidden_size // heads
        return HeadSizes(config.num_key_value_heads or heads, size, size, size)

    @staticmethod
    def describe(config: GroupedQueryConfig) -> str:
        """As Attention.describe: "GQA 8:2"."""
        queries, keys = config.num_attention_heads, config.kv_heads
        return f"MHA {queries}" if queries == keys else f"{'MQA' if keys == 1 else 'GQA'} {queries}:{keys}"

    @staticmethod
    def cached_width(config: GroupedQueryConfig, ranks: int) -> int:
        """As Attention.cached_width."""
        return 2 * max(1, config.kv_heads // ranks) * config.head_size

    @staticmethod
    def check(config: GroupedQueryConfig) -> None:
        """As Sublayer.check."""
        heads, kv_heads = config.num_attention_heads, config.kv_heads
        if heads % kv_heads:
            raise ValueError(f"num_attention_heads = {heads} must be a multiple of num_key_value_heads = {kv_heads}")
        if config.head_dim is None and config.hidden_size % heads:
            raise ValueError(
                f"hidden_size = {config.hidden_size} is not divisible by num_attention_heads = {heads}; set head_dim"
            )
        if config.query_pre_attn_scalar is not None and config.qk_norm == "key-l2":
            raise ValueError(
                f"query_pre_attn_scalar = {config.query_pre_attn_scalar:g} cannot be used with qk_norm = 'key-l2', whose "
                "scores are not divided; remove one of them"
            )
        config.check_rotary("head_dim")

    @staticmethod
    def effective(config: GroupedQueryConfig) -> dict[str, Any]:
        """As Sublayer.effective."""
        scalar = None if config.qk_norm == "key-l2" else config.query_pre_attn_scalar or config.head_size
        return {"num_key_value_heads": config.kv_heads, "head_dim": config.head_size, "query_pre_attn_scalar": scalar}

    def project(self, h_TD: Tensor, positions: Positions) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, S, n, H] and k, v [B, S, k, H] of this rank, normalised, not yet rotated."""
        input_TD = self.kit.column_input(h_TD)
        B = positions.tokens.batch
        shape = (B, input_TD.shape[0] // B, -1, self.head_size)
        key_input = h_TD if self.replicated_kv else input_TD
        q, k, v = self.q_proj(input_TD), self.k_proj(key_input), self.v_proj(key_input)
        if self.qk_norm == "rms-all-heads":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.replicated_kv:
            k, v = (self._select_kv(self.kit.column_input(x).view(shape)) for x in (k, v))
        q, k, v = q.view(shape), k.view(shape), v.view(shape)
        match self.qk_norm:
            case "none" | "rms-all-heads":
                pass
            case "rms":
                q, k = self.q_norm(q), self.k_norm(k)
            case "key-l2":
                k = normalize(k, dim=-1)  # KeyNorm: no gain and no 1/sqrt(H) (Su 2023, kexue.fm/archives/9859)
            case _:
                raise ValueError(f"model.qk_norm = '{self.qk_norm}' is unknown; legal: none, rms, rms-all-heads, key-l2")
        return q, k, v

    def _select_kv(self, x: Tensor) -> Tensor:
        """The kv head of this rank's query heads out of all K."""
        return x.narrow(2, self.kit.rank * self.sizes.kv_heads // self.kit.size, 1)

    def queries(self, q: Tensor, positions: Positions) -> tuple[Tensor, Tensor | None]:
        """As Attention.queries."""
        return self.layer_positions.rotate_queries(q, positions, self.layer_positions.has_far_pairs(positions))

    def keys(self, k: Tensor, v: Tensor, *, positions: Positions, start: int = 0) -> KeysAndValues:  # type: ignore[override]
        """As Attention.keys."""
        far = self.layer_positions.has_far_pairs(positions)
        near_k, far_k = self.layer_positions.rotate_keys(k, positions, far, start=start)
        return KeysAndValues(near_k, v, far_k)

    def forward(self, h_TD: Tensor, positions: Positions, cache: LayerCache | None = None) -> Tensor:
        """As Attention.forward."""
        unrotated = self.project(h_TD, positions)
        if cache is None:
            # Not in one function with `project`: ZeRO 3's hooks break the compiled code inside it, and a rest without an
            # operation, as that of an unrotated layer would be, makes torch run the same rest of all layers uncompiled from
            # then on.
            out = self.attend_projected(*unrotated, positions=positions, compiled=self.compiled)
        elif isinstance(cache, LayerRowCache):
            out = self.attend_chunk(*unrotated, positions=positions, cache=cache, compiled=self.compiled)
        else:
            window = self.layer_positions.kernel_window(positions)
            inputs = self.layer_positions.rotate_inputs(*unrotated, positions, far=True)
            if cache.extend(inputs):
                out = cache.attend(inputs, self.scale)
            else:
                out = attend(inputs if window else inputs.near(), self.scale, window, positions.documents)
        return self.output(out.reshape(-1, self.local_heads * self.head_size), h_TD)

    def output(self, out: Tensor, h_TD: Tensor) -> Tensor:
        """What the layer adds to the residual stream, of the results of this rank's heads, [T, n H], and its own input."""
        return self.o_proj(out)

    def logit_rows(self) -> dict[str, LogitRows]:
        """As Attention.logit_rows: a factor of the logits is shared by the query and its key, or, where several query heads
        have one key head, is the query's alone."""
        N, K, H = self.query_heads, self.sizes.kv_heads, self.head_size
        share = 0.5 if K == N else 1.0
        queries = LogitRows.of_heads(N, (H, share))
        return {"q_proj": queries, "k_proj": queries} if K == N else {"q_proj": queries}

    def whole_inputs(self) -> list[int]:
        """As Sublayer.whole_inputs: the stream, and the keys and values of replicated heads."""
        keys = self.sizes.kv_heads * self.head_size
        return [self.hidden_size, keys, keys] if self.replicated_kv else [self.hidden_size]

    def summed_scalars(self) -> int:
        """As Sublayer.summed_scalars: mean squares over the heads of all ranks."""
        return 0 if self.qk_norm != "rms-all-heads" else 1 if self.replicated_kv else 2

    def sources(self) -> tuple[tuple[int, int], ...]:
        """As Attention.sources: keys and values."""
        return (self.local_kv_heads, self.head_size), (self.local_kv_heads, self.head_size)

    def kept(self, execution: Execution, sequence_length: int) -> Kept:
        """As Sublayer.kept: attention's own, and the inputs of the norms of queries and keys."""
        n, k, H = self.local_heads, self.local_kv_heads, self.head_size
        attention = self.attend_kept(execution, sequence_length, k)
        head = norm_bytes(H, execution, self.zero_centered)
        match self.qk_norm:
            case "rms":
                norms = (n + k) * head
            case "rms-all-heads":
                keys = execution.stream(self.sizes.kv_heads * H) if self.replicated_kv else k * H
                norms = sum(norm_bytes(width, execution, self.zero_centered) for width in (n * H, keys))
            case "key-l2":
                norms = k * norm_bytes(H, execution)
            case _:
                norms = 0.0
        return Kept(attention.products, attention.everything + norms)
