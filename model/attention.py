"""Grouped-query attention: multi-head and multi-query are its ends. Names are Hugging Face Llama's."""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from model.cache import LayerCache
from model.config import ModelConfig
from model.heads import Heads
from model.kernels import attend
from model.latent import LatentAttention
from model.layers import Kit
from model.pattern import Place
from model.positions import Reading


def attention(config: ModelConfig, layer: int, kit: Kit) -> nn.Module:
    """The attention of one layer.

    Raises:
        ValueError: the tensor-parallel size does not divide the query heads.
    """
    if config.num_attention_heads % kit.size:
        raise ValueError(
            f"num_attention_heads = {config.num_attention_heads} cannot be split over tensor_parallel_size = {kit.size}; "
            "choose a divisor"
        )
    match config.attention:
        case "gqa":
            return Attention(config, layer, kit)
        case "mla":
            return LatentAttention(config, layer, kit)
        case _:
            raise ValueError(f"model.attention = '{config.attention}' is unknown; legal: gqa, mla")


def local_groups(heads: int, kv_heads: int, size: int, rank: int) -> list[int]:
    """The key head of each query head of this rank: query head a belongs to key head a // (heads / kv_heads)."""
    count = heads // size
    return [a * kv_heads // heads for a in range(rank * count, (rank + 1) * count)]


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: ModelConfig, layer: int, kit: Kit):
        super().__init__()
        self.config, self.kit, self.place = config, kit, Place(config, layer)
        self.compiled = False
        """Whether the block is, and with it the attention of a CPU."""
        N, K, H, D = config.num_attention_heads, config.kv_heads, config.head_size, config.hidden_size
        self.head_size = H
        self.shared_kv = K % kit.size != 0
        """More ranks than key heads: every rank computes all of them and keeps those of its query heads."""
        key_value = kit.replicated if self.shared_kv else kit.column
        self.q_proj = kit.column(D, N * H)
        self.k_proj = key_value(D, K * H)
        self.v_proj = key_value(D, K * H)
        self.o_proj = kit.row(N * H, D)
        rms = config.qk_norm == "rms"
        self.q_norm = kit.head_norm(H, config.rms_norm_eps) if rms else None
        self.k_norm = kit.head_norm(H, config.rms_norm_eps) if rms else None
        self.scale = 1.0 if config.qk_norm == "key-l2" else H**-0.5
        self.groups = local_groups(N, K, kit.size, kit.rank)
        self.own_groups: Tensor
        self.register_buffer("own_groups", torch.tensor(self.groups), persistent=False)

    def project(self, h_TD: Tensor, reading: Reading) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [B, S, heads, H] of this rank, normalised, not yet rotated."""
        entered = self.kit.enter(h_TD)
        shape = (reading.batch, reading.sequence, -1, self.head_size)
        q = self.q_proj(entered).view(shape)
        if self.shared_kv:
            k, v = (self._own(self.kit.enter(proj(h_TD)).view(shape)) for proj in (self.k_proj, self.v_proj))
        else:
            k, v = self.k_proj(entered).view(shape), self.v_proj(entered).view(shape)
        match self.config.qk_norm:
            case "none":
                pass
            case "rms":
                assert self.q_norm is not None and self.k_norm is not None
                q, k = self.q_norm(q), self.k_norm(k)
            case "key-l2":
                k = normalize(k, dim=-1)  # KeyNorm: no gain and no 1/sqrt(H) (kexue 9859)
            case _:
                raise ValueError(f"model.qk_norm = '{self.config.qk_norm}' is unknown; legal: none, rms, key-l2")
        return q, k, v

    def _own(self, x: Tensor) -> Tensor:
        """The key heads of this rank's query heads; one per query head where groups straddle ranks."""
        first, count = self.groups[0], self.groups[-1] - self.groups[0] + 1
        share = len(self.groups) // count
        if self.groups == [first + a // share for a in range(len(self.groups))]:
            return x.narrow(2, first, count)
        return x.index_select(2, self.own_groups)

    def rotated(self, h_TD: Tensor, reading: Reading) -> Heads:
        """What meets in the scores of this layer, without a cache."""
        return self.turned(*self.project(h_TD, reading), reading)

    def turned(self, q: Tensor, k: Tensor, v: Tensor, reading: Reading) -> Heads:
        """What is projected, rotated, with far parts where there is a window: the training form."""
        return self.place.heads(q, k, v, reading, far=self.place.window(reading) is not None)

    def forward(self, h_TD: Tensor, reading: Reading, cache: LayerCache | None = None) -> Tensor:
        """What the layer adds to the residual stream, [T, D] (T / tensor-parallel ranks under sequence parallelism).

        Args:
            h_TD: normed residual stream.
            reading: positions of this forward pass.
            cache: keys and values of earlier tokens, grown by these.
        """
        window, unrotated = self.place.window(reading), self.project(h_TD, reading)
        if cache is None:
            # Not through `rotated`: ZeRO 3's hooks break the compiled code inside project, and a rest without an operation,
            # as that of an unrotated layer would be, makes torch run the same rest of all layers uncompiled from then on.
            out = attend(self.turned(*unrotated, reading), self.scale, window, reading.documents, self.compiled)
        else:
            heads = self.place.heads(*unrotated, reading, far=True)
            if cache.extend(heads):
                out = cache.attend(heads, self.scale)
            else:
                out = attend(heads if window else heads.near(), self.scale, window, reading.documents)
        return self.o_proj(out.reshape(-1, len(self.groups) * self.head_size))
