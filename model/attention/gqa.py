"""Grouped-query attention (Ainslie et al. 2023); multi-head and multi-query are its ends. Names are Hugging Face Llama's."""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from model.attention.kernels.inputs import AttentionInputs
from model.attention.kernels.operator import attend
from model.attention.kv_cache import LayerKVCache
from model.attention.sliding_window import LayerPositions
from model.config import ModelConfig
from model.parallel.layers import Kit
from model.positions.batch import Positions


def kv_head_indices(query_heads: int, kv_heads: int, size: int, rank: int) -> list[int]:
    """The kv head of each query head on tensor-parallel rank `rank` of `size`: a // (query_heads / kv_heads) for head a."""
    n = query_heads // size
    return [a * kv_heads // query_heads for a in range(rank * n, (rank + 1) * n)]


class GroupedQueryAttention(nn.Module):
    """Grouped-query attention with rotary positions, its heads split over tensor-parallel ranks."""

    def __init__(self, config: ModelConfig, layer: int, kit: Kit):
        super().__init__()
        self.config, self.kit, self.layer_positions = config, kit, LayerPositions(config, layer)
        self.compiled = False
        """Whether the block is compiled, and with it the attention of a CPU."""
        N, K, H, D = config.num_attention_heads, config.kv_heads, config.head_size, config.hidden_size
        self.head_size = H
        self.replicated_kv = K % kit.size != 0
        """The ranks do not divide the kv heads: every rank computes all of them and keeps those of its query heads."""
        kv_linear = kit.replicated if self.replicated_kv else kit.column
        self.q_proj = kit.column(D, N * H)
        self.k_proj = kv_linear(D, K * H)
        self.v_proj = kv_linear(D, K * H)
        self.o_proj = kit.row(N * H, D)
        rms = config.qk_norm == "rms"
        self.q_norm = kit.head_norm(H, config.rms_norm_eps) if rms else None
        self.k_norm = kit.head_norm(H, config.rms_norm_eps) if rms else None
        self.scale = 1.0 if config.qk_norm == "key-l2" else H**-0.5
        self.kv_heads = kv_head_indices(N, K, kit.size, kit.rank)
        self.kv_heads_n: Tensor
        self.register_buffer("kv_heads_n", torch.tensor(self.kv_heads), persistent=False)

    def project(self, h_TD: Tensor, positions: Positions) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, S, n, H] and k, v [B, S, k, H] of this rank, normalised, not yet rotated."""
        input_TD = self.kit.column_input(h_TD)
        shape = (positions.tokens.batch, positions.tokens.sequence, -1, self.head_size)
        q = self.q_proj(input_TD).view(shape)
        if self.replicated_kv:
            k, v = (self._select_kv(self.kit.column_input(proj(h_TD)).view(shape)) for proj in (self.k_proj, self.v_proj))
        else:
            k, v = self.k_proj(input_TD).view(shape), self.v_proj(input_TD).view(shape)
        match self.config.qk_norm:
            case "none":
                pass
            case "rms":
                assert self.q_norm is not None and self.k_norm is not None
                q, k = self.q_norm(q), self.k_norm(k)
            case "key-l2":
                k = normalize(k, dim=-1)  # KeyNorm: no gain and no 1/sqrt(H) (Su 2023, kexue.fm/archives/9859)
            case _:
                raise ValueError(f"model.qk_norm = '{self.config.qk_norm}' is unknown; legal: none, rms, key-l2")
        return q, k, v

    def _select_kv(self, x: Tensor) -> Tensor:
        """The kv heads of this rank's query heads out of all K; one per query head where groups straddle ranks."""
        first, count = self.kv_heads[0], self.kv_heads[-1] - self.kv_heads[0] + 1
        group = len(self.kv_heads) // count
        if self.kv_heads == [first + a // group for a in range(len(self.kv_heads))]:
            return x.narrow(2, first, count)
        return x.index_select(2, self.kv_heads_n)

    def attention_inputs(self, q: Tensor, k: Tensor, v: Tensor, positions: Positions) -> AttentionInputs:
        """Rotated queries and keys from what `project` gives, with far ones where there are far pairs: without a cache."""
        return self.layer_positions.rotate_inputs(
            q, k, v, positions, far=self.layer_positions.kernel_window(positions) is not None
        )

    def forward(self, h_TD: Tensor, positions: Positions, cache: LayerKVCache | None = None) -> Tensor:
        """What the layer adds to the residual stream, [T, D] (T / tensor-parallel ranks under sequence parallelism).

        Args:
            h_TD: normed residual stream.
            positions: positions of this forward pass.
            cache: keys and values of earlier tokens; those of this pass are appended.
        """
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
        return self.o_proj(out.reshape(-1, len(self.kv_heads) * self.head_size))
