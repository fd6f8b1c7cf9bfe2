"""Grouped-query attention (Ainslie et al. 2023); multi-head and multi-query are its ends. Names are Hugging Face Llama's."""

from typing import Any

from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from model.attention.base import Attention
from model.attention.heads import AttentionConfig, HeadSizes
from model.attention.kernels.inputs import AttentionInputs
from model.attention.kernels.operator import attend
from model.attention.kv_cache import LayerKVCache
from model.parallel.layers import Kit
from model.positions.batch import Positions
from model.sublayer import Execution, Kept


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
        kv_linear = kit.replicated if self.replicated_kv else kit.column
        self.q_proj = kit.column(D, N * H, start, "attention")
        self.k_proj = kv_linear(D, K * H, start, "attention")
        self.v_proj = kv_linear(D, K * H, start, "attention")
        self.o_proj = kit.row(N * H, D, config.residual_initial, "attention")
        rms = config.qk_norm == "rms"
        self.q_norm = kit.head_norm(H, config.rms_norm_eps) if rms else None
        self.k_norm = kit.head_norm(H, config.rms_norm_eps) if rms else None
        self.scale = 1.0 if config.qk_norm == "key-l2" else H**-0.5
        self.local_kv_heads = max(1, K // kit.size)

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
    def check(config: GroupedQueryConfig) -> None:
        """As Sublayer.check."""
        heads, kv_heads = config.num_attention_heads, config.kv_heads
        if heads % kv_heads:
            raise ValueError(f"num_attention_heads = {heads} must be a multiple of num_key_value_heads = {kv_heads}")
        if config.head_dim is None and config.hidden_size % heads:
            raise ValueError(
                f"hidden_size = {config.hidden_size} is not divisible by num_attention_heads = {heads}; set head_dim"
            )
        config.check_rotary("head_dim")

    @staticmethod
    def effective(config: GroupedQueryConfig) -> dict[str, Any]:
        """As Sublayer.effective."""
        return {"num_key_value_heads": config.kv_heads, "head_dim": config.head_size}

    def project(self, h_TD: Tensor, positions: Positions) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, S, n, H] and k, v [B, S, k, H] of this rank, normalised, not yet rotated."""
        input_TD = self.kit.column_input(h_TD)
        shape = (positions.tokens.batch, positions.tokens.sequence, -1, self.head_size)
        q = self.q_proj(input_TD).view(shape)
        if self.replicated_kv:
            k, v = (self._select_kv(self.kit.column_input(proj(h_TD)).view(shape)) for proj in (self.k_proj, self.v_proj))
        else:
            k, v = self.k_proj(input_TD).view(shape), self.v_proj(input_TD).view(shape)
        match self.qk_norm:
            case "none":
                pass
            case "rms":
                assert self.q_norm is not None and self.k_norm is not None
                q, k = self.q_norm(q), self.k_norm(k)
            case "key-l2":
                k = normalize(k, dim=-1)  # KeyNorm: no gain and no 1/sqrt(H) (Su 2023, kexue.fm/archives/9859)
            case _:
                raise ValueError(f"model.qk_norm = '{self.qk_norm}' is unknown; legal: none, rms, key-l2")
        return q, k, v

    def _select_kv(self, x: Tensor) -> Tensor:
        """The kv head of this rank's query heads out of all K."""
        return x.narrow(2, self.kit.rank * self.sizes.kv_heads // self.kit.size, 1)

    def attention_inputs(self, q: Tensor, k: Tensor, v: Tensor, positions: Positions) -> AttentionInputs:
        """Rotated queries and keys from what `project` gives, with far ones where there are far pairs: without a cache."""
        return self.layer_positions.rotate_inputs(
            q, k, v, positions, far=self.layer_positions.kernel_window(positions) is not None
        )

    def forward(self, h_TD: Tensor, positions: Positions, cache: LayerKVCache | None = None) -> Tensor:
        """As Attention.forward."""
        window, unrotated = self.layer_positions.kernel_window(positions), self.project(h_TD, positions)
        if cache is None:
            # Not in one function with `project`: ZeRO 3's hooks break the compiled code inside it, and a rest without an
            # operation, as that of an unrotated layer would be, makes torch run the same rest of all layers uncompiled from
            # then on.
            inputs = self.attention_inputs(*unrotated, positions)
            out = attend(inputs, self.scale, window, positions.documents, self.compiled)
        else:
            inputs = self.layer_positions.rotate_inputs(*unrotated, positions, far=True)
            if cache.extend(inputs):
                out = cache.attend(inputs, self.scale)
            else:
                out = attend(inputs if window else inputs.near(), self.scale, window, positions.documents)
        return self.output(out.reshape(-1, self.local_heads * self.head_size), h_TD)

    def output(self, out: Tensor, h_TD: Tensor) -> Tensor:
        """What the layer adds to the residual stream, of the results of this rank's heads, [T, n H], and its own input."""
        return self.o_proj(out)

    def whole_inputs(self) -> list[int]:
        """As Sublayer.whole_inputs: the stream, and the keys and values of replicated heads."""
        keys = self.sizes.kv_heads * self.head_size
        return [self.hidden_size, keys, keys] if self.replicated_kv else [self.hidden_size]

    def kept(self, execution: Execution, sequence_length: int) -> Kept:
        """As Sublayer.kept: attention's own, and the inputs of the norms of queries and keys, float32 and in their dtype."""
        n, k, H = self.local_heads, self.local_kv_heads, self.head_size
        attention, element = self.attend_kept(execution, sequence_length, k), execution.element_bytes
        normed = {"none": 0.0, "rms": n + k, "key-l2": k}[self.qk_norm]
        each = H * element + 4 if execution.compiled else H * (4 + element)
        return Kept(attention.products, attention.everything + normed * each)
