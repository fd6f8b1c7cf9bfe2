"""Multi-head latent attention as DeepSeek-V2 (arXiv 2405.04434) and V3 define it, names as theirs.

Keys and values come from one normed latent of kv_lora_rank elements per token; the rotated part of the key is one vector for
all heads and comes from the residual stream itself. Training computes keys and values of every head. Decoding caches the
latent and the rotated key only, and multiplies the up-projections into the query and the output (absorption).
"""

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from model.attention.base import Attention, LayerCache
from model.attention.heads import AttentionConfig, HeadSizes
from model.attention.kernels.inputs import AttentionInputs, KeysAndValues
from model.attention.kv_cache import LayerKVCache
from model.attention.logits import LogitRows
from model.attention.row_cache import LayerRowCache
from model.parallel.layers import Kit
from model.positions.batch import Positions
from model.sublayer import MAY_CHANGE, Execution, Kept, norm_bytes


class LatentConfig(AttentionConfig, frozen=True):
    """Keys of multi-head latent attention."""

    q_lora_rank: int | None = Field(default=None, gt=0, description="MLA: rank of the query latent; none = full-rank queries.")
    kv_lora_rank: int | None = Field(default=None, gt=0, description="MLA: width of the cached key-value latent.")
    qk_nope_head_dim: int | None = Field(default=None, gt=0, description="MLA: part of a head without rotation.")
    qk_rope_head_dim: int | None = Field(default=None, gt=0, description="MLA: rotated part of a head (even).")
    v_head_dim: int | None = Field(default=None, gt=0, description="MLA: width of a value head.")
    latent_norm_eps: Annotated[float | None, MAY_CHANGE] = Field(
        default=None, gt=0, description="MLA: rms_norm_eps of the latents' norms (1e-6 in DeepSeek). Default rms_norm_eps."
    )


class LatentAttention(Attention):
    """Multi-head latent attention; its up-projections are split over tensor-parallel ranks by heads, the rest is whole."""

    section = LatentConfig

    def __init__(self, config: LatentConfig, layer: int, kit: Kit):
        super().__init__(config, layer, kit)
        N, D, start = config.num_attention_heads, config.hidden_size, config.initial
        eps, self.zero_centered = config.latent_norm_eps or config.rms_norm_eps, config.zero_centered_gains
        assert config.qk_nope_head_dim and config.qk_rope_head_dim and config.v_head_dim and config.kv_lora_rank
        self.nope_size, self.rope_size, self.value_size = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.latent_size = config.kv_lora_rank
        self.scale = (self.nope_size + self.rope_size) ** -0.5  # of the un-absorbed widths, in both forms
        self.q_lora_rank = config.q_lora_rank
        if config.q_lora_rank is None:
            self.q_proj = kit.column(D, N * (self.nope_size + self.rope_size), start, "attention")
        else:
            self.q_a_proj = kit.replicated(D, config.q_lora_rank, start, "attention")
            self.q_a_layernorm = kit.norm(config.q_lora_rank, eps, self.zero_centered)
            self.q_b_proj = kit.column(config.q_lora_rank, N * (self.nope_size + self.rope_size), start, "attention")
        self.kv_a_proj_with_mqa = kit.replicated(D, self.latent_size + self.rope_size, start, "attention")
        self.kv_a_layernorm = kit.norm(self.latent_size, eps, self.zero_centered)
        self.kv_b_proj = kit.column(self.latent_size, N * (self.nope_size + self.value_size), start, "attention")
        self.o_proj = kit.row(N * self.value_size, D, config.residual_initial, "attention")

    @staticmethod
    def head_sizes(config: LatentConfig) -> HeadSizes:
        """As Attention.head_sizes."""
        rotary = config.qk_rope_head_dim or 0
        head = (config.qk_nope_head_dim or 0) + rotary
        return HeadSizes(config.num_attention_heads, head, rotary, config.v_head_dim or 0)

    @staticmethod
    def describe(config: LatentConfig) -> str:
        """As Attention.describe."""
        return "mla"

    @staticmethod
    def cached_width(config: LatentConfig, ranks: int) -> int:
        """As Attention.cached_width: the latent is whole on every rank."""
        return (config.kv_lora_rank or 0) + config.rotary_size

    @staticmethod
    def check(config: LatentConfig) -> None:
        """As Sublayer.check."""
        need = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        missing = [name for name in need if getattr(config, name) is None]
        if missing:
            raise ValueError(
                f"attention = 'mla' needs {', '.join(missing)}; set {'it' if len(missing) == 1 else 'them'} in [model]"
            )
        if config.qk_norm != "none":
            raise ValueError(
                f"qk_norm = '{config.qk_norm}' cannot be used with attention = 'mla': absorbed decoding never computes "
                "the keys that would be normalised; use qk_norm = 'none'"
            )
        for key, off in (("attention_bias", "none"), ("query_pre_attn_scalar", None)):
            if (value := getattr(config, key)) != off:
                raise ValueError(
                    f"{key} = {value!r} cannot be used with attention = 'mla', which has no such {key.split('_')[-1]}; "
                    "leave it out or use attention = 'gqa'"
                )
        config.check_rotary("qk_rope_head_dim")

    @staticmethod
    def effective(config: LatentConfig) -> dict[str, Any]:
        """As Sublayer.effective."""
        return {"latent_norm_eps": config.latent_norm_eps or config.rms_norm_eps}

    def project(self, h_TD: Tensor, positions: Positions) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, S, n, nope + rope], normed latents [B, S, 1, latent], shared keys [B, S, 1, rope], not yet rotated."""
        if self.q_lora_rank is None:
            q = self.q_proj(self.kit.column_input(h_TD))
        else:
            q = self.q_b_proj(self.kit.column_input(self.q_a_layernorm(self.q_a_proj(h_TD))))
        latent, shared_k = self.kv_a_proj_with_mqa(h_TD).split((self.latent_size, self.rope_size), dim=-1)
        both = self.kit.column_input(torch.cat((self.kv_a_layernorm(latent), shared_k), dim=-1))
        B = positions.tokens.batch
        both = both.view(B, both.shape[0] // B, 1, -1)
        return q.view(*both.shape[:2], self.local_heads, -1), both[..., : self.latent_size], both[..., self.latent_size :]

    def forward(self, h_TD: Tensor, positions: Positions, cache: LayerCache | None = None) -> Tensor:
        """As Attention.forward."""
        q, latent, shared_k = self.project(h_TD, positions)
        if isinstance(cache, LayerRowCache):
            out = self.attend_chunk(q, latent, shared_k, positions=positions, cache=cache, compiled=self.compiled)
            return self.o_proj(out.reshape(-1, self.local_heads * self.value_size))
        if cache is not None:
            cached = self.layer_positions.rotate_inputs(
                q[..., self.nope_size :], shared_k, latent, positions, far=True, interleaved=True
            )
            if cache.extend(cached):
                return self.o_proj(self._absorbed_attention(q, cached, positions, cache))
        out = self.attend_projected(q, latent, shared_k, positions=positions, compiled=self.compiled and cache is None)
        return self.o_proj(out.reshape(-1, self.local_heads * self.value_size))

    def expand(self, latent: Tensor, shared_k: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """Unrotated part of the keys [B, S, n, nope], values [B, S, n, value], and the shared keys as they are."""
        B, S = latent.shape[:2]
        up = self.kv_b_proj(latent.reshape(B * S, self.latent_size))
        up = up.view(B, S, self.local_heads, self.nope_size + self.value_size)
        return *up.split((self.nope_size, self.value_size), dim=-1), shared_k

    def queries(self, q: Tensor, positions: Positions) -> tuple[Tensor, Tensor | None]:
        """As Attention.queries."""
        far, rope = self.layer_positions.has_far_pairs(positions), q[..., self.nope_size :]
        near_q, far_q = self.layer_positions.rotate_queries(rope, positions, far, interleaved=True)
        q_nope = self.layer_positions.scale_queries(q[..., : self.nope_size], positions)
        return torch.cat((q_nope, near_q), dim=-1), None if far_q is None else torch.cat((q_nope, far_q), dim=-1)

    def keys(  # type: ignore[override]
        self, k_nope: Tensor, v: Tensor, shared_k: Tensor, *, positions: Positions, start: int = 0
    ) -> KeysAndValues:
        """As Attention.keys."""
        far, shape = self.layer_positions.has_far_pairs(positions), (*k_nope.shape[:3], self.rope_size)
        near_k, far_k = self.layer_positions.rotate_keys(shared_k, positions, far, start=start, interleaved=True)

        def key(rotated: Tensor) -> Tensor:
            return torch.cat((k_nope, rotated.expand(shape)), dim=-1)

        return KeysAndValues(key(near_k), v, None if far_k is None else key(far_k))

    def _absorbed_attention(self, q: Tensor, inputs: AttentionInputs, positions: Positions, cache: LayerKVCache) -> Tensor:
        """[T, n * value]: attention over the cached latents, one key head and one value head for all queries."""
        weight = self.kv_b_proj.weight.view(self.local_heads, self.nope_size + self.value_size, self.latent_size)
        w_key, w_value = weight.split((self.nope_size, self.value_size), dim=1)
        q_nope = self.layer_positions.scale_queries(q[..., : self.nope_size], positions)
        q_latent = torch.einsum("bsnh,nhr->bsnr", q_nope, w_key)
        out = cache.attend(inputs, self.scale, extra_q=q_latent)
        return torch.einsum("bsnr,nvr->bsnv", out, w_value).reshape(-1, self.local_heads * self.value_size)

    def logit_rows(self) -> dict[str, LogitRows]:
        """As Attention.logit_rows: unrotated queries and keys share a factor; of rotated ones the query has all of it, since
        all heads share the key."""
        N, nope, rope, value = self.query_heads, self.nope_size, self.rope_size, self.value_size
        queries = LogitRows.of_heads(N, (nope, 0.5), (rope, 1.0))
        keys = LogitRows.of_heads(N, (nope, 0.5), (value, 0.0))
        return {"q_proj" if self.q_lora_rank is None else "q_b_proj": queries, "kv_b_proj": keys}

    def whole_inputs(self) -> list[int]:
        """As Sublayer.whole_inputs: the query latent or the stream, and the key-value latent with the shared key."""
        return [self.q_lora_rank or self.hidden_size, self.latent_size + self.rope_size]

    def sources(self) -> tuple[tuple[int, int], ...]:
        """As Attention.sources: latents and shared keys."""
        return (1, self.latent_size), (1, self.rope_size)

    def expanded(self) -> tuple[tuple[int, int], ...]:
        """As Attention.expanded: unrotated parts of keys, values, shared keys."""
        return (self.local_heads, self.nope_size), (self.local_heads, self.value_size), (1, self.rope_size)

    def expand_flops(self) -> float:
        """As Attention.expand_flops: the up-projection of the latents."""
        return 2.0 * self.latent_size * self.query_heads * (self.nope_size + self.value_size)

    def kept(self, execution: Execution, sequence_length: int) -> Kept:
        """As Sublayer.kept: attention's own, and the latents with their norms. Gathered latents are projected up in the
        forward and again in a recomputation, which compiled code saves."""
        element, n, up = execution.element_bytes, self.local_heads, self.local_heads * (self.nope_size + self.value_size)
        attention = self.attend_kept(execution, sequence_length, n)
        latents = (self.q_lora_rank or 0) + self.latent_size
        gathered = execution.context_parallel_size if execution.gathers_keys else 1
        projected = up * gathered if execution.compiled or gathered == 1 else 0
        heads = n * (self.sizes.head + self.value_size) + projected
        probabilities = self.probabilities(execution, sequence_length)
        products = element * (latents + self.rope_size + heads + probabilities) + 4 * n
        if execution.compiled:  # latents before and after their norms, and as gathered
            more = element * (2 * (latents + self.rope_size) + (self.latent_size * gathered if gathered > 1 else 0))
        else:
            taken = (self.q_lora_rank or 0) + self.latent_size * gathered
            more = norm_bytes(latents, execution, self.zero_centered) + taken * element
        if execution.context_parallel_size == 1 and not probabilities:  # the values are slices, which no kernel copies
            more += element * n * self.nope_size
        return Kept(products, attention.everything + more)
