"""Grouped-query attention: multi-head and multi-query are its ends. Names are Hugging Face Llama's."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from model.config import ModelConfig
from model.kernels import Heads, attend
from model.parallel import Kit
from model.positions import Reading, reading, rotate

__all__ = ["Attention", "Reading", "attention", "reading"]


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
        case _:
            raise ValueError(f"model.attention = '{config.attention}' is unknown; legal: gqa, mla")


class Place:
    """What a layer of the pattern sees: everything or a sliding window, with or without positions (kexue 9603, 9731).

    Windowed layers always turn plainly (their distances are short) and have no log n; full layers beside windowed ones
    read with the run's map (HWFA2) or with no positions at all (HWFA).
    """

    def __init__(self, config: ModelConfig, layer: int):
        full = config.full_layer(layer)
        self.sliding_window = None if full else config.sliding_window
        self.turns = not (full and config.sliding_window is not None and config.full_attention_position == "none")

    def heads(self, q: Tensor, k: Tensor, v: Tensor, reading: Reading, far: bool) -> Heads:
        """Rotated queries and keys of all regions that the layer needs.

        Args:
            q, k, v: [B, S, heads, size] before rotation.
            far: make the far parts too, where the layer can have them.
        """
        factor = None if self.sliding_window else reading.factor
        near = reading.near if self.turns else None
        near_q, near_k = rotate(q, near, factor), rotate(k, near)
        if not (far and self.two_regions(reading)):
            return Heads(near_q, near_k, v)
        return Heads(near_q, near_k, v, rotate(q, reading.far_query, factor), rotate(k, reading.far_key))

    def two_regions(self, reading: Reading) -> bool:
        """Whether the layer's map has a far region at all."""
        return self.turns and self.sliding_window is None and reading.window is not None

    def window(self, reading: Reading) -> int | None:
        """The window to hand to the kernel."""
        if self.sliding_window is not None:
            return self.sliding_window if self.sliding_window < reading.sequence else None
        return reading.window if self.two_regions(reading) and reading.split else None


def local_groups(heads: int, kv_heads: int, size: int, rank: int) -> list[int]:
    """The key head of each query head of this rank: query head a belongs to key head a // (heads / kv_heads)."""
    count = heads // size
    return [a * kv_heads // heads for a in range(rank * count, (rank + 1) * count)]


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: ModelConfig, layer: int, kit: Kit):
        super().__init__()
        self.config, self.kit, self.place = config, kit, Place(config, layer)
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
        return x.index_select(2, torch.tensor(self.groups, device=x.device))

    def forward(self, h_TD: Tensor, reading: Reading, cache: Any = None) -> Tensor:
        """What the layer adds to the residual stream, [T, D] (T / tensor-parallel ranks under sequence parallelism).

        Args:
            h_TD: normed residual stream.
            reading: positions of this forward pass.
            cache: keys and values of earlier tokens (model/cache.py), grown by these.
        """
        q, k, v = self.project(h_TD, reading)
        window = self.place.window(reading)
        heads = self.place.heads(q, k, v, reading, far=window is not None)
        out = attend(heads, self.scale, window, reading.documents)
        return self.o_proj(out.reshape(-1, len(self.groups) * self.head_size))
