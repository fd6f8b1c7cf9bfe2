"""Multi-head latent attention as DeepSeek-V2 and V3 define it, names as theirs.

Keys and values come from one normed latent of kv_lora_rank numbers a token; the rotated part of the key is one vector for
all heads and comes from the residual stream itself. Training forms keys and values for every head. Decoding caches the
latent and the rotated key only, and multiplies the up-projections into the query and the output (absorption).
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from model.cache import LayerCache
from model.config import ModelConfig
from model.heads import Heads
from model.kernels import attend
from model.layers import Kit
from model.pattern import Place
from model.positions import Reading


class LatentAttention(nn.Module):
    """Multi-head latent attention; its up-projections are split over tensor-parallel ranks by heads, the rest is whole."""

    def __init__(self, config: ModelConfig, layer: int, kit: Kit):
        super().__init__()
        self.kit, self.place = kit, Place(config, layer)
        self.compiled = False
        """Whether the block is, and with it the attention of a CPU."""
        N, D, eps = config.num_attention_heads, config.hidden_size, config.rms_norm_eps
        assert config.qk_nope_head_dim and config.qk_rope_head_dim and config.v_head_dim and config.kv_lora_rank
        self.nope, self.rope, self.value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.rank, self.heads = config.kv_lora_rank, N // kit.size
        self.scale = (self.nope + self.rope) ** -0.5  # of the un-absorbed widths, in both forms
        self.q_lora_rank = config.q_lora_rank
        if config.q_lora_rank is None:
            self.q_proj = kit.column(D, N * (self.nope + self.rope))
        else:
            self.q_a_proj = kit.replicated(D, config.q_lora_rank)
            self.q_a_layernorm = kit.norm(config.q_lora_rank, eps)
            self.q_b_proj = kit.column(config.q_lora_rank, N * (self.nope + self.rope))
        self.kv_a_proj_with_mqa = kit.replicated(D, self.rank + self.rope)
        self.kv_a_layernorm = kit.norm(self.rank, eps)
        self.kv_b_proj = kit.column(self.rank, N * (self.nope + self.value))
        self.o_proj = kit.row(N * self.value, D)

    def project(self, h_TD: Tensor, reading: Reading) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, S, n, nope + rope], normed latents [B, S, 1, rank], shared keys [B, S, 1, rope], not yet rotated."""
        if self.q_lora_rank is None:
            q = self.q_proj(self.kit.enter(h_TD))
        else:
            q = self.q_b_proj(self.kit.enter(self.q_a_layernorm(self.q_a_proj(h_TD))))
        latent, shared = self.kv_a_proj_with_mqa(h_TD).split((self.rank, self.rope), dim=-1)
        both = self.kit.enter(torch.cat((self.kv_a_layernorm(latent), shared), dim=-1))
        B, S = reading.batch, reading.sequence
        both = both.view(B, S, 1, -1)
        return q.view(B, S, self.heads, -1), both[..., : self.rank], both[..., self.rank :]

    def forward(self, h_TD: Tensor, reading: Reading, cache: LayerCache | None = None) -> Tensor:
        """What the layer adds to the residual stream; arguments as model.attention.Attention."""
        q, latent, shared = self.project(h_TD, reading)
        if cache is not None:
            turned = self.place.heads(q[..., self.nope :], shared, latent, reading, far=True, interleaved=True)
            if cache.extend(turned):
                return self.o_proj(self._absorbed(q, turned, reading, cache))
        heads, window = self.expand(q, latent, shared, reading), self.place.window(reading)
        out = attend(heads, self.scale, window, reading.documents, self.compiled and cache is None)
        return self.o_proj(out.reshape(-1, self.heads * self.value))

    def rotated(self, h_TD: Tensor, reading: Reading) -> Heads:
        """What meets in the scores of this layer, without a cache."""
        return self.expand(*self.project(h_TD, reading), reading)

    def expand(self, q: Tensor, latent: Tensor, shared: Tensor, reading: Reading) -> Heads:
        """Keys and values of every head from the latents: the training form."""
        k_nope, v = self._up(latent)
        far = self.place.window(reading) is not None
        turned = self.place.heads(q[..., self.nope :], shared, v, reading, far, interleaved=True)
        q_nope = self.place.scale(q[..., : self.nope], reading)
        shape = (*k_nope.shape[:3], self.rope)

        def query(part: Tensor) -> Tensor:
            return torch.cat((q_nope, part), dim=-1)

        def key(part: Tensor) -> Tensor:
            return torch.cat((k_nope, part.expand(shape)), dim=-1)

        near = replace(turned, near_q=query(turned.near_q), near_k=key(turned.near_k))
        if turned.far_q is None or turned.far_k is None:
            return near
        return replace(near, far_q=query(turned.far_q), far_k=key(turned.far_k))

    def _up(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        B, S = latent.shape[:2]
        up = self.kv_b_proj(latent.reshape(B * S, self.rank)).view(B, S, self.heads, self.nope + self.value)
        return up.split((self.nope, self.value), dim=-1)

    def _absorbed(self, q: Tensor, turned: Heads, reading: Reading, cache: LayerCache) -> Tensor:
        """[T, n * value]: attention over the cached latents, one key head and one value head for all queries."""
        weight = self.kv_b_proj.weight.view(self.heads, self.nope + self.value, self.rank)
        w_key, w_value = weight.split((self.nope, self.value), dim=1)
        q_nope = self.place.scale(q[..., : self.nope], reading)
        q_latent = torch.einsum("bsnh,nhr->bsnr", q_nope, w_key)
        out = cache.attend(turned, self.scale, extra_q=q_latent)
        return torch.einsum("bsnr,nvr->bsnv", out, w_value).reshape(-1, self.heads * self.value)
